"""Networks of others, as they are: ``timm:NAME``, ``torchvision:NAME``, ``FILE.py:FUNCTION``, ``PACKAGE.MODULE:FUNCTION``, or in memory.

Options of a network stand behind its name: ``timm:NAME:drop_path_rate=0.1:drop_rate=0.1``. They are part of the name.

Their taps are read by forward hooks, so that no model is edited. A dry run finds them (``survey``); a table may name others.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import advice, trust
from ..checks import FAILURES, UserError, did_you_mean, first_line, summary
from ..randomness import seeded
from ..types import DataSpec, NetSpec, Outputs, TapSpec
from .base import FORMS, Network
from .code import contents, digest, hashes, own_modules, place_of
from .hooks import Keep, Seen, hook, remove_all
from .input_adapter import InputSpec
from .layers import by_blocks, by_timm
from .loading import Neighbours, of_file, of_package
from .survey import LARGE, Survey, survey, takes_channels_last

WRITTEN = re.compile(r"(?P<where>timm|torchvision|module|[^@]+\.py|[A-Za-z_][\w.]*):(?P<name>[^:@=]+)(?P<options>(:[A-Za-z_]\w*=[^:@]+)*)")
MODULE = "module"  # before the name of one that was given from Python
LIBRARIES = ("timm", "torchvision", MODULE)
FOREIGN_NAMES = ("timm:NAME", "torchvision:NAME", "FILE.py:FUNCTION")  # as messages name them
HEAD = "classifier"  # its row in a table of taps
SIZES = {
    "classes": ("classes", "num_classes"),
    "channels": ("channels", "in_channels", "in_chans"),
    "size": ("size", "image_size", "img_size"),
}
"""What a user's function may want to know -> the names of its parameters for it."""
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")  # of torchvision
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of every torchvision network

OF_LIBRARIES = {
    "timm": ("drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "patch_drop_rate"),
    "torchvision": ("dropout", "attention_dropout", "stochastic_depth_prob"),
}
"""Options that a library's networks are given by name: their rates of dropout and of stochastic depth."""

Make = Callable[[DataSpec], nn.Module]
Options = Mapping[str, bool | int | float | str]
IN_MEMORY: dict[str, nn.Module] = {}


class Foreign(Network):
    """A module with hooks at its taps and at its classifier. Its weights have the names that they have in the module itself."""

    def __init__(
        self, inner: nn.Module, spec: NetSpec, taps: tuple[str, ...], dry_run: Survey, neighbours: Neighbours | None = None
    ) -> None:
        super().__init__()
        self.neighbours = neighbours or Neighbours()
        self.inner, self.spec, self.named, self.overwrites = inner, spec, dry_run.named, dry_run.overwrites
        self.pooling = dry_run.pooling
        self.draws_always, self.unsettled, self.grown = dry_run.draws_always, dry_run.unsettled, dry_run.grown
        self.memory_format = torch.channels_last if dry_run.channels_last else torch.contiguous_format
        self.taps = tuple(spec.tap(name).name for name in taps)
        self.paths = {name: spec.tap(name).module for name in self.taps}
        self.layouts = {path: dry_run.layouts[path] for path in self.paths.values()}
        self.overwritten, self.order = dry_run.overwritten & self.layouts.keys(), dry_run.order
        self.all_stages = dry_run.stages
        self._hook()
        self.register_state_dict_post_hook(_without_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_prefix)  # type: ignore[no-untyped-call]

    def _hook(self) -> None:
        self.seen = Seen()
        keepers = [(path, Keep(self.seen, path, overwritten=path in self.overwritten)) for path in self.layouts]
        if self.pooling is None:
            keepers += [(self.spec.head, Keep(self.seen, HEAD, first_input=True))]
        self.hooks = [hook(self.inner.get_submodule(path), keep) for path, keep in keepers]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("hooks", "seen")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy hooks of its own: the module that it holds was copied without any."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._hook()

    @property
    def body(self) -> nn.Module:
        """The module itself."""
        return self.inner

    def release(self) -> nn.Module:
        """The module without the hooks."""
        remove_all(self.hooks)
        return self.inner

    def answer(self, images: Tensor) -> Outputs:
        """Images [N, C, H, W] -> Outputs."""
        if self.memory_format is torch.contiguous_format:
            images = images.contiguous()
        self.seen.clear()
        self.seen.watching = True
        try:
            with self.neighbours.at_hand() if self.neighbours.late else nullcontext():
                output = self.inner(images.clone() if self.overwrites else images)
        finally:
            seen = dict(self.seen)
            self.seen.clear()
            self.seen.watching = False
        self._refuse_skipped(seen)
        maps = {name: self.layouts[path].map(seen[path]) for name, path in self.paths.items()}
        if self.pooling is not None:
            features = self.pooling(output)
            return Outputs(features[:, :0], features, maps)
        return Outputs(output.logits if self.named else output, seen[HEAD].flatten(1), maps)

    def layer_numbers(self) -> Mapping[str, int]:
        """As ``Network`` says: as timm groups them, or by the blocks and stages that the dry run found."""
        return by_timm(self.inner, self.spec.name) or by_blocks(self.inner, self.all_stages, self.order)

    def refuse_cut(self, outputs: Outputs, *, embedding: bool) -> None:
        """Refuse outputs, which were computed with gradients on, from which no gradient goes where it should.

        Raises:
            UserError: no gradient would go from a tap, or from the embedding, to a parameter before it that is trained.
        """
        values = [(f"tap {name}={path}", path, outputs.maps[name]) for name, path in self.paths.items()]
        values += [("the embedding", self.spec.head, outputs.embedding)] * embedding
        for label, path, value in values:
            if not value.requires_grad and (parameter := self._trained_before(path)):
                raise UserError(
                    f"{label}: {self.spec.name} gives it without a gradient, though {parameter} before it is trained; name another, let go "
                    f"of what cuts it off (detach, no_grad, checkpoint with use_reentrant=True), or freeze what is before it"
                )

    def _trained_before(self, path: str) -> str:
        """The first trained parameter of the modules that ended no later than this one; empty if there is none.

        For the classifier only modules that ended before it count: its input is what is kept.
        """
        last = self.order[path]
        for earlier, end in self.order.items():
            if end < last or (end == last and path != self.spec.head):
                for name, parameter in self.inner.get_submodule(earlier).named_parameters(earlier, recurse=False):
                    if parameter.requires_grad:
                        return name
        return ""

    def _refuse_skipped(self, seen: Mapping[str, Tensor]) -> None:
        for name, path in self.paths.items():
            if path not in seen:
                cure = "name a module that is called for every batch, or switch off what skips this one"
                raise UserError(f"tap {name}={path}: {self.spec.name} did not call it on this batch; {cure}")
        if HEAD not in seen and self.pooling is None:
            raise UserError(f"{self.spec.name} did not call its classifier {self.spec.head} on this batch; switch off what skips it")


def surveyed(
    net: nn.Module, name: str, channels: int, height: int, width: int, classes: int | None = None, *, bare: bool = False
) -> Survey:
    """What a dry run of a module shows.

    Args:
        classes, bare: as of ``survey``.

    Raises:
        UserError: the module can't take such images, or is no classifier, and gives no features either where these are allowed.
    """
    try:
        with seeded(0, "survey"), torch.inference_mode(False), torch.compiler.set_stance("force_eager"):
            return survey(net, channels, height, width, classes, bare=bare)
    except FAILURES as error:  # of the network's own code
        reason = first_line(error) if isinstance(error, ValueError | RuntimeError) else summary(error)
        raise UserError(f"{name}: no classifier of images of {channels}x{height}x{width}: {reason}") from None


def refuse_unready(module: nn.Module, name: str) -> None:
    """Refuse a module whose weights have no size or no numbers yet, or are not in single precision, or that is TorchScript.

    Raises:
        UserError: it has such a weight, or such a part; the error names the first one.
    """
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            subject = f"its {path} is" if path else "is"
            raise UserError(f"{name}: {subject} TorchScript, whose maps can't be looked at; give the nn.Module that it was made of")
    for path, value in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(value):
            problem = "has no size yet; run the module once on a batch of images"
        elif value.is_meta:
            problem = "is on the meta device, without numbers; put the module on a device with .to_empty(device=...) and load its weights"
        elif isinstance(value, nn.Parameter) and value.is_floating_point() and value.dtype != torch.float32:
            problem = f"is {str(value.dtype).removeprefix('torch.')}, images are float32; give the module in single precision, .float()"
        else:
            continue
        raise UserError(f"{name}: {path} {problem}")


def tensors(module: nn.Module, name: str) -> dict[str, Tensor]:
    """The state dict of a module.

    Raises:
        UserError: ``refuse_unready`` refuses the module, or its state holds something else than tensors.
    """
    refuse_unready(module, name)
    weights: dict[str, Any] = module.state_dict()
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{name}: its state has {key!r}, which is no tensor; give a module whose state_dict holds tensors alone")
    return weights


def _without_prefix(_net: nn.Module, weights: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in weights if name.startswith(f"{prefix}inner.")]:
        weights[prefix + name.removeprefix(f"{prefix}inner.")] = weights.pop(name)


def _with_prefix(_net: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in weights if name.startswith(prefix)]:
        weights[f"{prefix}inner.{name.removeprefix(prefix)}"] = weights.pop(name)


class ForeignFactory:
    """A network by the name of what makes it. A dry run finds its sizes and taps.

    Attributes:
        code, file_code: as ``Factory`` says.
        in_memory: whether it is a module in memory, whose number of classes is fixed.
    """

    def __init__(self, name: str, code: Mapping[str, str]) -> None:
        written = WRITTEN.fullmatch(name)
        assert written is not None
        self.name, self.in_memory, self.code = name, written["where"] == MODULE, code
        self.file_code = next((hashed for label, hashed in code.items() if label == _label(written["where"])), "")
        self.options = _options(name, written["where"], written["options"])
        self.make, self.about, self.neighbours = _maker(written["where"], written["name"], self.options)
        self._surveys: dict[tuple[int, ...], Survey] = {}
        self._contents: dict[tuple[int, ...], str] = {}

    def network(self, data: DataSpec) -> nn.Module:
        """The module for such data.

        Raises:
            UserError: the code that makes it fails, or gives no module that can be used.
        """
        try:
            with self.neighbours.at_hand(), torch.device("cpu"):  # on meta tensors, which hold no numbers, some can't be made
                net = self.make(data)
        except UserError:
            raise
        except FAILURES as error:
            size = f"{data.channels}x{data.height}x{data.width}"
            raise UserError(f"{self.name}: can't be made for images of {size} and {data.classes} classes: {summary(error)}") from None
        if not isinstance(net, nn.Module):
            raise UserError(f"{self.name}: gives a {type(net).__name__}; it must give an nn.Module")
        tensors(net, self.name)
        return net

    def survey(self, data: DataSpec) -> Survey:
        """What a dry run of the network shows.

        Raises:
            UserError: the network can't take such images, or is no classifier of so many classes.
        """
        key = _sizes(data)
        if key not in self._surveys:
            with self.neighbours.at_hand(), seeded(0, "survey"), torch.device("cpu"), torch.compiler.set_stance("force_eager"):
                net = self.network(data)
                self._contents[key] = contents(net, exact=False) if self.code else ""  # before it runs, and may keep what it saw
                bare = not data.classes and self.name.startswith("timm:")  # which leaves the classifier of any network out
                dry_run = surveyed(net, self.name, data.channels, data.height, data.width, data.classes, bare=bare)
                dry_run.channels_last = takes_channels_last(net, data.channels, data.height, data.width)
            if dry_run.head and dry_run.classes != data.classes and not self.in_memory:
                raise UserError(
                    f"{self.name}: gives {dry_run.classes} classes where {data.classes} are wanted; let it take their number as `classes`"
                )
            rates = [f"{option}={value}" for option, value in self.options.items() if option in sum(OF_LIBRARIES.values(), ()) and value]
            if rates and not dry_run.draws:
                raise UserError(f"{self.name}: {', '.join(rates)} changes nothing, the network draws no random numbers; leave it out")
            self._surveys[key] = dry_run
        return self._surveys[key]

    def made_of(self, data: DataSpec) -> str:
        """The hash of its code and of what the code makes; empty for a library's network, and for a module, whose name has the hash."""
        self.survey(data)
        return digest([dict(self.code), self._contents[_sizes(data)]]) if self.code else ""

    def spec(self, data: DataSpec) -> NetSpec:
        """The network with the taps that the dry run found."""
        return self.survey(data).spec(self.name)

    def tapped(self, data: DataSpec, table: Mapping[str, str]) -> NetSpec:
        """The network with the taps of a table. It names a module's path, a path with wildcards, whose matches are numbered, or a tap that
        the dry run found.

        Raises:
            UserError: there is no such module, or none whose output is a map.
        """
        dry_run = self.survey(data)
        taps = tuple(tap for name, pattern in table.items() for tap in self._matching(dry_run, name, pattern))
        return replace(dry_run.spec(self.name), taps=taps)

    def draws(self, data: DataSpec) -> bool:
        """Whether its layers drew random numbers in train mode in the dry run."""
        return self.survey(data).draws

    def declared_input_spec(self) -> InputSpec:
        """The images that a library declares for its network; nothing is known of other networks."""
        where, _, name = without_options(self.name).partition(":")
        if where == "torchvision":
            return InputSpec(None, LARGE, LARGE, IMAGENET_MEAN, IMAGENET_STD)
        configured = _configured(name) if where == "timm" else None
        if configured is None:
            return InputSpec()
        _, height, width = configured.input_size
        return InputSpec(None, height, width, tuple(configured.mean), tuple(configured.std))

    def _matching(self, dry_run: Survey, name: str, pattern: str) -> Iterator[TapSpec]:
        if pattern in dry_run.ends:
            yield dry_run.tap(name, dry_run.ends[pattern])
            return
        paths = [path for path in dry_run.layouts if fnmatchcase(path, pattern) and path.count(".") == pattern.count(".")]
        if not paths:
            raise UserError(
                f"tap {name}={pattern}: {self.name} has no such module that gives a map; {did_you_mean(pattern, dry_run.layouts)}"
            )
        if paths == [pattern]:
            yield dry_run.tap(name, pattern)
            return
        for number, path in enumerate(paths, 1):
            yield dry_run.tap(f"{name}{number}", path)

    def build(self, data: DataSpec, spec: NetSpec, taps: tuple[str, ...]) -> Foreign:
        """The network with the weights that it is made with."""
        return Foreign(self.network(data), spec, taps, self.survey(data), self.neighbours)


def _sizes(data: DataSpec) -> tuple[int, ...]:
    return data.channels, data.height, data.width, data.classes


def without_options(name: str) -> str:
    """A model's name without the options of its network; any other name as it is."""
    written = WRITTEN.fullmatch(name)
    return name.removesuffix(written["options"]) if written else name


def _options(name: str, where: str, written: str) -> dict[str, bool | int | float | str]:
    """The options behind a network's name.

    Raises:
        UserError: one is given twice, is none of those that a library's networks are given here, or is no rate; or a module has some.
    """
    options: dict[str, bool | int | float | str] = {}
    for key, _, value in (option.partition("=") for option in written.split(":")[1:]):
        if key in options:
            raise UserError(f"{name}: {key} is given twice; give it once")
        options[key] = _value(value)
    if where == MODULE and options:
        raise UserError(f"{name}: a module given from Python is made already; leave {', '.join(options)} out")
    for key, rate in options.items() if where in OF_LIBRARIES else ():
        if key not in OF_LIBRARIES[where]:
            raise UserError(f"{name}: unknown option {key!r}; {did_you_mean(key, OF_LIBRARIES[where])}")
        if isinstance(rate, bool | str) or not 0 <= rate < 1:
            raise UserError(f"{name}: {key}={rate}: a rate is a number of at least 0 and below 1")
    return options


def _value(text: str) -> bool | int | float | str:
    """A number, true or false; else the text."""
    for read in (int, float):
        with suppress(ValueError):
            return read(text)
    return text == "true" if text in ("true", "false") else text


def _maker(where: str, name: str, options: Options) -> tuple[Make, str, Neighbours]:
    """How a network is made, what it is, and which modules lie beside its file.

    Raises:
        UserError: there is no such library, file, function or name.
    """
    if where == "timm":
        return _timm(name, options), f"{name} of timm", Neighbours()
    if where == "torchvision":
        return _torchvision(name, options), f"{name} of torchvision", Neighbours()
    if where == MODULE:
        if name not in IN_MEMORY:
            raise UserError(f"{MODULE}:{name} was given from Python, and is in no file; {advice.from_python()}")
        return lambda _: deepcopy(IN_MEMORY[name]), f"{name}, a module given from Python", Neighbours()
    module, neighbours = of_file(Path(where)) if where.endswith(".py") else (of_package(where), Neighbours())
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{where}:{name}: {where} has no function of that name; {did_you_mean(name, names)}")
    try:
        return _user_function(function, f"{where}:{name}", options), f"{name} of {where}", neighbours
    except UserError:
        raise
    except (TypeError, ValueError):  # of C
        raise UserError(f"{where}:{name}: does not say what its parameters are; write a function or class in Python") from None


def timm_library(name: str) -> Any:
    """timm, which has this model.

    Raises:
        UserError: it is not installed, or has no such model.
    """
    try:
        import timm
    except ImportError:
        raise UserError(f"timm:{name}: timm is not installed; pip install timm") from None
    if not timm.is_model(name):
        raise UserError(f"unknown model 'timm:{name}': {did_you_mean(name, timm.list_models())}")
    return timm


def _timm(name: str, options: Options) -> Make:
    timm = timm_library(name)

    def make(data: DataSpec) -> nn.Module:
        configured = _configured(name)
        sized: dict[str, Any] = {"img_size": (data.height, data.width)} if configured and configured.fixed_input_size else {}
        net: nn.Module = timm.create_model(name, num_classes=data.classes, in_chans=data.channels, **sized, **options)
        return net

    return make


def _configured(name: str) -> Any:
    """What timm declares of a network, or None."""
    import timm

    return timm.get_pretrained_cfg(name)


def torchvision_library(name: str) -> Any:
    """The models of torchvision, which have this one.

    Raises:
        UserError: they do not.
    """
    from torchvision import models as library

    names = library.list_models(module=library)
    if name not in names:
        raise UserError(f"unknown model 'torchvision:{name}': {did_you_mean(name, names)}")
    return library


def _torchvision(name: str, options: Options) -> Make:
    library = torchvision_library(name)

    def make(data: DataSpec) -> nn.Module:
        if data.channels != 3:
            raise UserError(f"torchvision:{name} takes 3 channels, the images have {data.channels}; set data.channels=3, or use timm:")
        sized: dict[str, Any] = {"image_size": data.height} if name.startswith("vit_") else {}
        quiet = {"aux_logits": False, "init_weights": True} if name in WITH_AUXILIARY_HEADS else {}
        net: nn.Module = library.get_model(name, weights=None, num_classes=data.classes, **sized, **quiet, **options)
        return net

    return make


def _user_function(function: Callable[..., Any], name: str, options: Options) -> Make:
    """A user's function as ``Make``. It gets classes, channels and size if it has parameters for them, and the options.

    Raises:
        UserError: it has no parameter for an option, or is told it already.
    """
    parameters = inspect.signature(function).parameters
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    told = [parameter for names in SIZES.values() for parameter in names]
    for key in options:
        if key in told:
            raise UserError(f"{name}: {key} is told by the data; leave {key}={options[key]} out")
        if key not in parameters and not any_name:
            own = [parameter for parameter in parameters if parameter not in told]
            raise UserError(f"{name}: unknown option {key!r}; {did_you_mean(key, own) if own else 'it has none'}")

    def make(data: DataSpec) -> Any:
        values = {"classes": data.classes, "channels": data.channels, "size": data.height}
        return function(**{name: values[quantity] for quantity, names in SIZES.items() for name in names if name in parameters}, **options)

    return make


def foreign(name: str) -> ForeignFactory:
    """The factory of a foreign network's name; another one if its code has changed.

    Raises:
        UserError: the name is that of code that nobody vouches for; the code is not run.
    """
    if where := own_place(name):
        trust.meet(name, where, lambda: _code(name))
    return _factory(name, tuple(_code(name).items()))


def own_place(name: str) -> str:
    """Where the own code of a network's name lies; empty if the name is of no own code, or the file is not there."""
    where = _where(name)
    missing = where.endswith(".py") and not Path(where).expanduser().is_file()
    return "" if not where or missing else place_of(where)


def _where(name: str) -> str:
    """The file or package in the name of own code; empty for any other name."""
    written = WRITTEN.fullmatch(name)
    return written["where"] if written and written["where"] not in LIBRARIES else ""


def _code(name: str) -> dict[str, str]:
    """SHA-256 of each file of own code that a network needs."""
    where = _where(name)
    if not where:
        return {}
    if not where.endswith(".py"):
        return hashes(own_modules(where))
    file = Path(where).expanduser()
    return hashes(own_modules(file.resolve())) if file.is_file() else {}


def _label(where: str) -> str:
    """The label, in the list of its code, of the file that a network's name says."""
    return Path(where).name if where.endswith(".py") else f"{where.replace('.', '/')}.py"


@functools.lru_cache(maxsize=64)
def _factory(name: str, code: tuple[tuple[str, str], ...]) -> ForeignFactory:
    return ForeignFactory(name, dict(code))


FORMS[WRITTEN] = foreign


def is_foreign(name: str) -> bool:
    """Whether a name is written as a foreign network's."""
    return WRITTEN.fullmatch(name) is not None


def uncompiled(module: Any) -> Any:
    """The module that ``torch.compile`` was given, if this one is its result; else this one."""
    return getattr(module, "_orig_mod", module)


def adopt(module: nn.Module, key: str) -> str:
    """Keep a module in memory; returns its name as a model's. The key tells it from other modules."""
    name = f"{type(module).__name__}-{key}"
    IN_MEMORY[name] = module
    return f"{MODULE}:{name}"
