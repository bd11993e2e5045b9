"""What a network is here, how one is built, and where each is registered by its name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import UserError, as_user_error, first_line
from ..config import model_name
from ..randomness import seeded
from ..registry import Registry
from ..types import DataSpec, NetSpec, Outputs, TapSpec
from .input_adapter import InputAdapter, InputSpec
from .layers import by_blocks, order_of
from .state import shape_buffers

CAM = "cam"


class NoClassifier(nn.Module):
    """Stands where a network without a classifier has none: features [N, D] -> logits [N, 0]."""

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        return features[:, :0]


class Network(nn.Module):
    """A network as training sees it: called on images [N, C, H, W] it gives Outputs with the taps it was built for.

    Attributes:
        input_adapter: turns images as the data gives them into those that the network was made for; None if they are that already.
        layer_seed: the seed of what its layers draw in train mode, as dropout does; None if they draw nothing.
        draws_always: whether they draw in eval mode too.
        unsettled: whether a pass in eval mode moves its buffers, as observers of quantisation do.
        grown: names of the buffers that take another shape, or are there at all, after the first pass.
        each_once: whether a pass runs each of its layers once, and only layers use their weights.
        about: what the file that it was loaded from says of it.
        changed: what of it is another than that file says, and was accepted; else empty.
        memory_format: of its weights, and of the images that it works on.
    """

    spec: NetSpec
    taps: tuple[str, ...]
    each_once: bool = False
    about: Mapping[str, Any] = {}
    changed: str = ""
    memory_format: torch.memory_format = torch.channels_last

    def __init__(self) -> None:
        super().__init__()
        self.input_adapter: InputAdapter | None = None
        self.layer_seed: int | None = None
        self.draws_always, self.unsettled, self.grown = False, False, frozenset[str]()

    def on(self, device: torch.device) -> Network:
        """The network on a device, its weights in its memory format."""
        return self.to(device=device, memory_format=self.memory_format)  # type: ignore[call-overload, no-any-return]

    def forward(self, images: Tensor) -> Outputs:
        """Images [N, C, H, W] -> Outputs."""
        return self.answer(images if self.input_adapter is None else self.input_adapter(images))

    def answer(self, images: Tensor) -> Outputs:
        """Images as the network was made for -> Outputs."""
        raise NotImplementedError

    @property
    def body(self) -> nn.Module:
        """The module whose parameters and modules have the names that the spec and a weights file give them."""
        return self

    def layer_numbers(self) -> Mapping[str, int]:
        """Name of each of the body's parameters -> its layer, counted from 0 at the images' side; empty if nothing says their order."""
        return {}

    def take_over(self, student: Network, teacher: Network) -> None:
        """Take weights from the networks that a method builds this one of; other networks have none of these."""
        raise NotImplementedError

    def refuse_cut(self, outputs: Outputs, *, embedding: bool) -> None:
        """Refuse outputs from which no gradient goes where it should; of a network made here one goes."""

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights into it, named as its state dict names them."""
        shape_buffers(self.body, weights, self.grown)
        self.load_state_dict(dict(weights))

    def release(self) -> nn.Module:
        """The body as it is without this wrapping, which is of no use afterwards."""
        return self.body


class ImageNetwork(Network):
    """Base of the networks here: ``features`` gives every tap, and an instance those that it was asked for.

    Taps are after ReLU: ``stem``; ``stage1``, ..., the ends of the stages; ``stage1.first``, ..., the first convolution,
    normalisation and ReLU inside each. ``stage1.pre``, ... are the ends before their ReLU; where the ends are plain sums, which the layer
    after them normalises, ``stage1.pre`` and ``stage1.post``, ... are before and after its ReLU. ``cam`` are the class activation maps: the
    classifier, without its bias, at every position of the map whose mean is the embedding. What differs stands with the network.
    """

    each_once = True
    taps_version: int = 1
    """Raised when a tap gives another map under its name."""

    head: ClassVar[str] = "fc"
    paths: Mapping[str, str] = {}
    """Tap -> the last module on the way to it, a ReLU after it included."""
    norms: Mapping[str, str] = {}
    """Tap before a ReLU -> the batch normalisation that gives it, where there is a single one."""

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Images [N, C, H, W] -> every tap but ``cam``, and the map [N, D, H', W'] whose mean is the embedding."""
        raise NotImplementedError

    def answer(self, images: Tensor) -> Outputs:
        """Images [N, C, H, W] -> Outputs."""
        maps, last = self.features(images)
        head: Any = self.get_submodule(self.head)
        embedding = last.mean((2, 3))
        if CAM in self.taps:
            maps[CAM] = F.linear(last.permute(0, 2, 3, 1), head.weight).permute(0, 3, 1, 2)
        return Outputs(head(embedding), embedding, {name: maps[self.spec.tap(name).own] for name in self.taps})

    def layer_numbers(self) -> Mapping[str, int]:
        """As ``Network`` says. The modules of the networks here stand in the order in which they are called."""
        return by_blocks(self, self.paths, order_of(self))

    def fresh(self) -> None:
        """Convolutions by He et al. 2015, normal with variance 2 / fan-out; all else as PyTorch has it."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def by_stage(*stages: nn.Module) -> list[list[Any]]:
    """Module lists as lists of blocks."""
    return [list(stage) for stage in stages]  # type: ignore[call-overload]


def stage_by_stage(x: Tensor, *stages: nn.Module) -> dict[str, Tensor]:
    """The taps of stages whose blocks give their output before its ReLU, and the output of their first conv-BN-ReLU."""
    maps = {}
    for number, blocks in enumerate(by_stage(*stages), 1):
        for position, block in enumerate(blocks):
            before, first = block(x)
            x = F.relu(before)
            if position == 0:
                maps[f"stage{number}.first"] = first
        maps[f"stage{number}.pre"], maps[f"stage{number}"] = before, x
    return maps


class Factory(Protocol):
    """How a model is specified and built.

    Attributes:
        about: what it is, in a few words.
        code: SHA-256 of each file of own code that it needs, by name; of this package's and a library's networks nothing.
        file_code: SHA-256 of the file that was named alone, as runs of version 0.1.0 recorded it, or empty.
        in_memory: whether it is a module that was given from Python, which no command can name.
    """

    about: str
    code: Mapping[str, str]
    file_code: str
    in_memory: bool

    def made_of(self, data: DataSpec) -> str:
        """The hash of all that its numbers depend on beside its name, where its code is own code; else empty."""
        ...

    def spec(self, data: DataSpec) -> NetSpec:
        """What the network would offer for images of this size; builds nothing."""
        ...

    def tapped(self, data: DataSpec, table: Mapping[str, str]) -> NetSpec:
        """The same with the taps of a table, name -> where it is found."""
        ...

    def build(self, data: DataSpec, spec: NetSpec, taps: tuple[str, ...]) -> Network:
        """The network, giving just these of the spec's taps."""
        ...

    def draws(self, data: DataSpec) -> bool:
        """Whether its layers draw random numbers in train mode."""
        ...

    def declared_input_spec(self) -> InputSpec:
        """The images that published weights of it were made for, as far as that is known."""
        ...


class ImageFactory:
    """One registered network; its sizes are found by running it on meta tensors, which hold no numbers.

    Args:
        make: (image channels, classes) -> the network.
    """

    code: Mapping[str, str] = {}
    file_code = ""
    in_memory = False

    def __init__(self, name: str, about: str, make: Callable[[int, int], ImageNetwork]) -> None:
        self.name, self.about, self.make = name, about, make
        self._specs: dict[tuple[int, ...], NetSpec] = {}

    def spec(self, data: DataSpec) -> NetSpec:
        """Taps and sizes for images of the data's size.

        Raises:
            UserError: the images are too small or too large for it.
        """
        key = (data.channels, data.height, data.width, data.classes)
        if key not in self._specs:
            try:
                with torch.device("meta"):
                    net = self.network(data).eval()
                    maps, last = net.features(torch.empty(1, data.channels, data.height, data.width))
            except RuntimeError as error:  # too small for its pooling, or larger than anything
                raise UserError(f"{self.name} can't take images of {data.height}x{data.width}: {first_line(error)}") from None
            taps = []
            for tap, path in net.paths.items():
                _, channels, height, width = maps[tap].shape
                taps.append(TapSpec(tap, channels, height, width, path, net.norms.get(tap, "")))
            _, width_of_embedding, height, width = last.shape
            head = net.head if data.classes else ""
            if head:
                taps.append(TapSpec(CAM, data.classes, height, width, head))
            self._specs[key] = NetSpec(self.name, tuple(taps), width_of_embedding, data.classes, head, version=net.taps_version)
        return self._specs[key]

    def tapped(self, data: DataSpec, table: Mapping[str, str]) -> NetSpec:
        """Its own taps under the table's names; each is given by its own name, or by its module.

        Raises:
            UserError: it has no such tap.
        """
        whole = self.spec(data)

        def own(name: str, source: str) -> TapSpec:
            at = [tap for tap in whole.taps if tap.module == source]
            at.sort(key=lambda tap: (tap.name != name, "." in tap.name, tap.name.endswith(".pre")))  # else the stage, and after its ReLU
            return at[0] if at else whole.tap(source)

        with as_user_error():
            taps_by_name = {name: own(name, source) for name, source in table.items()}
        return replace(
            whole, taps=tuple(replace(tap, name=name, source="" if name == tap.name else tap.name) for name, tap in taps_by_name.items())
        )

    def made_of(self, data: DataSpec) -> str:  # noqa: ARG002 (others look)
        """Its name says all: what a network here computes changes with a version."""
        return ""

    def draws(self, data: DataSpec) -> bool:  # noqa: ARG002 (others look)
        """None here does."""
        return False

    def declared_input_spec(self) -> InputSpec:
        """Nothing is published."""
        return InputSpec()

    def network(self, data: DataSpec) -> ImageNetwork:
        """The network for such data, which does not know its taps yet; for 0 classes it has no classifier."""
        net = self.make(data.channels, data.classes or 1)
        if not data.classes:
            net.set_submodule(net.head, NoClassifier())
        return net

    def build(self, data: DataSpec, spec: NetSpec, taps: tuple[str, ...]) -> ImageNetwork:
        """The network with fresh weights."""
        net = self.network(data)
        net.spec = spec
        net.taps = tuple(spec.tap(name).name for name in taps)
        net.fresh()
        return net


MODELS: Registry[Factory] = Registry("model", "flowdistill.models")
FORMS: dict[re.Pattern[str], Callable[[str], Factory]] = {}
"""How the names of networks that are not registered are written -> their factory from the whole name."""


def register(name: str, about: str, make: Callable[[int, int], ImageNetwork]) -> None:
    """File a network under its name."""
    MODELS.register(name)(ImageFactory(name, about, make))


def factory(name: str) -> Factory:
    """How a network is built: a registered one, one that is made of others, or one of others.

    Raises:
        UserError: no such model.
    """
    form = next((form for form in FORMS if form.fullmatch(name)), None)
    return FORMS[form](name) if form else MODELS[model_name(name)]


def canonical(name: str) -> str:
    """A model's own name: ``resnet_32_20`` (the reference log's spelling) is ``resnet20``.

    Raises:
        UserError: no such model.
    """
    factory(name)
    return model_name(name)


def own_code(name: str) -> Mapping[str, str]:
    """SHA-256 of each file of own code that the network needs; nothing for one of this package or of a library."""
    return factory(name).code


def made_of(name: str, data: DataSpec) -> str:
    """What tells a network from others of its name: the hash of its code and of what that makes for such data; empty where the name
    says all.
    """
    return factory(name).made_of(data)


def spec(name: str, data: DataSpec, table: Mapping[str, str] | None = None) -> NetSpec:
    """What the network of that name would offer for such data, with a table the taps of that alone; builds nothing."""
    return factory(name).tapped(data, table) if table else factory(name).spec(data)


def build(name: str, data: DataSpec, *, taps: tuple[str, ...] = (), seed: int = 0, spec: NetSpec | None = None) -> Network:
    """A network with fresh weights, a function of (name, seed) and the data's sizes alone; ``spec`` if its taps have other names."""
    made = factory(name)
    offered = made.spec(data) if spec is None else spec
    with seeded(seed, "weights"):
        net = made.build(data, offered, taps)
    net.layer_seed = seed if made.draws(data) else None
    return net


def from_python(name: str) -> bool:
    """Whether the name stands for a module that was given from Python, and that no command can name."""
    return factory(name).in_memory


def declared_input_spec(name: str) -> InputSpec:
    """The images that published weights of the network were made for, as far as its library says."""
    return factory(name).declared_input_spec()
