"""What is used again is checked: whether a run's files are those that it wrote, and its network computes what it did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import models
from ..checks import Changes, UserError
from ..env import versions
from ..ledger import DAMAGED, EXPORTS, NAME, PREDICTIONS, RECORD, STUDENT_FILE, Ledger, Run, files_of, own_files, sealed, sealing
from ..models.code import file_hash
from ..models.probe import Answers, difference, probe
from ..training import checkpoint
from ..training.student_file import trained_network
from ..training.weights import Weights, fill, hash_weights, load_weights, write_whole
from ..types import DataSpec

Verdict = Literal["as written", "changed", "gone", "not verified"]


class Finding(NamedTuple):
    """A file of a run, and what is with it."""

    run: int
    file: str
    verdict: Verdict
    found: str = ""

    @property
    def sound(self) -> bool:
        """Nothing speaks against it."""
        return self.verdict in ("as written", "not verified")


def listed(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files, by name, as ``run.json`` has them."""
    return {name: {"size": (folder / name).stat().st_size, "sha256": file_hash(folder / name)} for name in names}


def write_record(folder: Path, record: dict[str, Any]) -> str:
    """Write ``run.json`` with a seal, for it is read as a config too; its hash."""
    write_whole(folder / RECORD, sealing(record), make_folder=False)
    return file_hash(folder / RECORD)


def examine(run: Run, ledger: Ledger, only: Sequence[str] = ()) -> list[Finding]:
    """Every file of a run: of a finished one those that ``run.json`` lists, or ``only`` some of them; of one that was cut off its
    checkpoint.
    """
    return [finding for finding in _examined(run, ledger.run_folder(run.no), ledger, only) if not only or finding.file in only]


def _examined(run: Run, folder: Path, ledger: Ledger, only: Sequence[str]) -> Iterator[Finding]:
    if run.status == DAMAGED:
        yield Finding(run.no, NAME, "changed", run.error)
        return
    if run.status != "finished":
        yield from _of_checkpoint(run, ledger)
        return
    own = own_files(run)
    for name in own:
        if not (folder / name).is_file():
            yield Finding(run.no, name, "gone")
    record = folder / RECORD
    if run.record_hash is None or not record.is_file():
        yield from _unlisted(run, folder)
        return
    if (record_hash := file_hash(record)) != run.record_hash:
        yield Finding(run.no, RECORD, "changed", f"SHA-256 {record_hash[:8]}, recorded {run.record_hash[:8]}")
        yield from _unlisted(run, folder)
        return
    yield Finding(run.no, RECORD, "as written")
    contents, exports = sealed(record), folder / EXPORTS
    if contents is not None and (apart := _apart(run, contents)):
        yield Finding(run.no, NAME, "changed", apart)
    exported = sealed(exports) if exports.is_file() else None
    if exports.is_file():
        yield Finding(run.no, EXPORTS, "changed", "its seal") if exported is None else Finding(run.no, EXPORTS, "as written")
    for name, known in (files_of(contents) | files_of(exported)).items():
        if (not only or name in only) and ((folder / name).is_file() or name not in own):
            yield _compared(run, folder, name, known)


def _compared(run: Run, folder: Path, name: str, known: Any) -> Finding:
    if not (folder / name).is_file():
        return Finding(run.no, name, "gone")
    now = listed(folder, [name])[name]
    if now == known:
        return Finding(run.no, name, "as written")
    size_and_hash = f"{now['size']:,} bytes, SHA-256 {now['sha256'][:8]}"
    if isinstance(known, Mapping) and isinstance(known.get("size"), int):
        size_and_hash += f", recorded {known['size']:,}, {str(known.get('sha256'))[:8]}"
    return Finding(run.no, name, "changed", size_and_hash)


def _apart(run: Run, contents: Mapping[str, Any]) -> str:
    """In what figures a row of the ledger is not what the run's record says; else empty."""
    figures = ("correct", "images", "epoch", "best_correct", "best_epoch", "top5", "macro_f1", "balanced_accuracy")
    names = ("fingerprint", "seed", *figures, "weights_hash")
    return ", ".join(
        f"{name} {getattr(run, name)}, {RECORD} says {contents.get(name)}" for name in names if contents.get(name) != getattr(run, name)
    )


def _unlisted(run: Run, folder: Path) -> Iterator[Finding]:
    """What a run without a list of its files wrote, as version 0.1.0 did; the ledger knows the hash of its weights."""
    for name in (STUDENT_FILE, PREDICTIONS, *([RECORD] if run.record_hash is None else [])):
        if (folder / name).is_file():
            weights = _weights(folder / name) if name == STUDENT_FILE else None
            if weights is not None and weights != run.weights_hash:
                yield Finding(run.no, name, "changed", f"weights {weights[:8]}, recorded {(run.weights_hash or '')[:8]}")
            else:
                yield Finding(
                    run.no, name, "not verified", "it was recorded without hashes of its files" if run.record_hash is None else ""
                )


def _weights(path: Path) -> str:
    try:
        return hash_weights(load_weights(path)[0])
    except UserError as error:
        return str(error)


def _of_checkpoint(run: Run, ledger: Ledger) -> Iterator[Finding]:
    if run.no == run.home and run.cut_off and (saved := checkpoint.load(ledger.run_folder(run.no))) is not None:
        yield Finding(run.no, checkpoint.FILE, "changed" if saved.damage else "as written", saved.damage)


def meet_damage(run: Run, ledger: Ledger) -> str:
    """Hold the student's file of a finished run, and the record that lists it, against what was written. How it differs, where that is
    accepted; else empty.

    Raises:
        UserError: it differs, and that is not accepted.
    """
    for finding in examine(run, ledger, (STUDENT_FILE, RECORD)):
        if not finding.sound and (finding.file, finding.verdict) != (STUDENT_FILE, "gone"):  # whoever reads it tells that
            damage = "is gone" if finding.verdict == "gone" else f"is not the file that it wrote ({finding.found})"
            ledger.changes.meet(f"run {run.no}: {finding.file} {damage}", "put a sound copy there, train it again with --again")
            return f"{finding.file} of run {run.no} changed"
    return ""


def missing(run: Run, ledger: Ledger) -> str:
    """Why a finished run is as good as not there: a file of its own is gone or changed; else empty."""
    broken = next((finding for finding in examine(run, ledger, own_files(run)) if not finding.sound), None)
    return f"{broken.file} is {'gone' if broken.verdict == 'gone' else 'not what it wrote'}" if broken else ""


def enlist(no: int, ledger: Ledger, file: Path) -> None:
    """Add a file in a run's folder to those that were exported there, which are listed apart: the run's own record stays as it is.

    Raises:
        UserError: that list is not the one that was written.
    """
    run, folder = ledger.run(no), ledger.run_folder(no)
    if run.record_hash is None or file.resolve().parent != folder.resolve():
        return
    with ledger.alone():
        before = sealed(folder / EXPORTS) if (folder / EXPORTS).is_file() else {}
        if before is None:
            raise UserError(f"run {no}: {EXPORTS} is not the file that was written, so {file.name} was written and not entered there")
        write_whole(folder / EXPORTS, sealing({"files": files_of(before) | listed(folder, [file.name])}))


def answers(model: str, sizes: DataSpec, weights: Weights) -> Answers:
    """What a trained network answers, with the taps that it has by itself."""
    spec = models.spec(model, sizes)
    net = models.build(model, sizes, taps=tuple(tap.name for tap in spec.taps), spec=spec)
    fill(net, weights, model)
    return probe(net, sizes.channels, sizes.height, sizes.width, trains=False)


def made_with(model: str, sizes: DataSpec, weights: Weights) -> dict[str, Any]:
    """What a file says of the network whose weights it holds: its code, its answers, and the versions that these came of."""
    return {"code": dict(models.own_code(model)), "answers": answers(model, sizes, weights), "versions": versions()}


def meet_changes(origin: str, model: str, sizes: DataSpec, weights: Weights, metadata: Mapping[str, Any], changes: Changes) -> str:
    """Hold a network against what its file says of it. How it differs, where that is accepted; else empty.

    Code that changed, and answers as it did, is told.

    Raises:
        UserError: it answers otherwise, and that is not accepted.
    """
    then = trained_network(metadata, origin)
    if then is None:
        return ""
    changed = ", ".join(changed_files(then.code, models.own_code(model)))
    apart = difference(then.answers, answers(model, sizes, weights))
    if not apart:
        if changed:
            changes.tell(f"{origin}: {changed} since it was trained; the answer to a fixed batch is what it was")
        return ""
    others = newer(then.versions)
    why = f"{changed} since it was trained" if changed else f"other versions than it was trained with{others}"
    changes.meet(f"{origin}: {why}: another answer to a fixed batch ({apart})", "put back what it was trained with")
    return why


def changed_files(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Which files of code changed, are gone or new, as the parts of a phrase."""
    for name in dict.fromkeys([*then, *now]):
        if then.get(name) != now.get(name):
            yield f"{name} {'changed' if name in then and name in now else 'is gone' if name in then else 'is new'}"


def newer(then: Mapping[str, str]) -> str:
    """Which versions are others than they were, as the end of a phrase."""
    now = versions()
    others = [f"{name} {then[name]} -> {now[name]}" for name in then if name in now and now[name] != then[name] and name != "platform"]
    return f"; {', '.join(others)}" if others else ""
