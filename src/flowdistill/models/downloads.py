"""Files that libraries download: from their caches, which are asked first, else by their own downloaders. A damaged file is refused."""

from __future__ import annotations

import contextlib
import logging
import re
import shlex
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

import torch

from ..checks import UserError, first_line, pass_on_shortage
from .code import file_hash

_HASHED = re.compile(r"-([0-9a-f]{8,64})\.\w+$")  # the start of its SHA-256 in a file's name, as torch.hub has it
_SHA256 = re.compile(r"[0-9a-f]{64}")  # the name of a large file's content in the cache of the Hugging Face hub


def of_hub(source: str, repository: str, files: tuple[str, ...], revision: str | None = None, *, beside: str = "") -> Path:
    """The first of these files that a repository of the Hugging Face hub has.

    Args:
        source: the weights' name, for messages.
        beside: another file that is needed from there, for messages.

    Raises:
        UserError: there is no such repository or file, it wants a token, the hub is out of reach, or the file in the cache is damaged.
    """
    try:
        from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache
    except ImportError:
        raise UserError(f"{source}: huggingface_hub is not installed; pip install timm") from None
    command = shlex.join(["hf", "download", repository, files[0], *filter(None, [beside]), *(["--revision", revision] if revision else [])])
    try:
        cached = (try_to_load_from_cache(repository, file, revision=revision) for file in files)
        path = next((path for path in cached if isinstance(path, str)), "")
        with _without_retries_told():
            for file in [] if path else files:
                try:
                    path = hf_hub_download(repository, file, revision=revision)
                    break
                except errors.LocalEntryNotFoundError:  # nobody knows; the next class is its base
                    raise
                except errors.EntryNotFoundError:  # the repository has no such file
                    continue
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{repository}"
        raise UserError(f"{source}: {repository} is given to those who asked for it; ask on {page}, then log in: hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{source}: the hub has no {repository}, or it is private; look at the name, or log in: hf auth login") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{source}: {repository} has no revision {revision!r}; name one that it has") from None
    except errors.HFValidationError as error:
        raise UserError(f"{source}: {first_line(error)}; write hf-hub:ORG/NAME") from None
    except Exception as error:  # each client of HTTP has errors of its own
        pass_on_shortage(error)
        raise _out_of_reach(source, error.__cause__ or error, command, Path(constants.HF_HUB_CACHE)) from None
    if not path:
        raise UserError(f"{source}: {repository} has no {' or '.join(files)}; name a model whose weights are safetensors")
    return _sound(source, Path(path))


def of_url(source: str, url: str) -> Path:
    """A file that torch.hub keeps under its own name.

    Args:
        source: the weights' name, for messages.

    Raises:
        UserError: the address is out of reach, or the file, or what was downloaded, is not what its name says.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        named = _HASHED.search(file.name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=named[1] if named else None, progress=False)
        except RuntimeError as error:  # another hash
            raise UserError(f"{source}: what {url} gave is damaged ({first_line(error)}); try again") from None
        except (OSError, HTTPException) as error:
            command = f'python -c "import torch; torch.hub.load_state_dict_from_url({url!r})"'
            raise _out_of_reach(source, error, command, file) from None
    return _sound(source, file)


@contextlib.contextmanager
def _without_retries_told() -> Iterator[None]:
    """Inside, the hub's client does not tell of each of its attempts; the last one's reason is in the error."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _out_of_reach(source: str, error: BaseException, command: str, cache: Path) -> UserError:
    return UserError(
        f"{source}: it is not in the cache and can't be downloaded ({first_line(error)}); run this on a machine with a network: {command}; "
        f"then copy {cache} from there to here"
    )


def _sound(source: str, file: Path) -> Path:
    """The file, once it was held against the hash in its name, or in that of its content.

    Raises:
        UserError: it is another file than its name says.
    """
    content = file.resolve()
    named = _SHA256.fullmatch(content.name) or _HASHED.search(file.name)
    if named and not file_hash(content).startswith(named[named.lastindex or 0]):
        raise UserError(f"{source}: {file} is damaged (its SHA-256 is not that in its name); delete {content}, and it is downloaded again")
    return file
