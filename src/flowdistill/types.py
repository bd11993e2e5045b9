"""The vocabulary that data, models, methods and training share: what a network offers, and what it gives for a batch.

Torch-free at run time, as config is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Outputs(NamedTuple):
    """A network's outputs for a batch, which are all that a method sees of it. A teacher gives only those that the method's ``needs`` name.

    Attributes:
        logits: [N, K] unnormalised class scores; K is 0 for a network without a classifier.
        embedding: [N, D] the pooled features that feed the classifier, if there is one.
        maps: tap name -> [N, C, H, W], only for the taps that were asked for when the network was built.
    """

    logits: Tensor
    embedding: Tensor
    maps: Mapping[str, Tensor] = {}


def numbered(name: str, number: int) -> str:
    """What belongs to one of several teachers, which are numbered from 1: ``at`` -> ``at@2``."""
    return f"{name}@{number}"


def unnumbered(name: str) -> str:
    """``at@2`` -> ``at``; a name without a number is as it was."""
    return name.partition("@")[0]


def of_number(named: Mapping[str, T], number: int) -> dict[str, T]:
    """What belongs to one of several teachers, by the names that it has there."""
    end = numbered("", number)
    return {name.removesuffix(end): value for name, value in named.items() if name.endswith(end)}


@dataclass(frozen=True)
class TapSpec:
    """A named intermediate feature map, declared before any image is seen.

    Attributes:
        name: ``stem``, ``stage1``, ``stage1.first``, ...
        channels, height, width: its size for one image.
        module: path of the last module that computes it, a ReLU after it included; two taps with the same path are the same tensor.
        norm: for a map before its ReLU, path of the batch normalisation that computes it, a shortcut aside; empty if no single one does.
        source: the network's own name for it, if pairing or the user gave it another; else empty.
    """

    name: str
    channels: int
    height: int
    width: int
    module: str = ""
    norm: str = ""
    source: str = ""

    @property
    def own(self) -> str:
        """The network's own name for it."""
        return self.source or self.name

    @property
    def shape(self) -> str:
        """``16x32x32``, as error messages print it."""
        return f"{self.channels}x{self.height}x{self.width}"


@dataclass(frozen=True)
class NetSpec:
    """What a network offers, known before it is built.

    Attributes:
        name: the model's name.
        taps: every tap it can give.
        embedding: D, the width of the pooled features.
        classes: K, the number of logits; 0 if it has no classifier, and can teach by its features alone.
        head: path of the module that turns the embedding into logits; empty without a classifier, or if nobody looked.
        overstepped: path of a convolution whose stride is larger than its map, so that some of its weights meet padding alone; empty if
            there is none, or if nobody looked.
        labels: the names of the classes, if known.
        version: version of its taps, raised when a name gives another map than before. If taps are compared and it is above 1, it is part
            of a run's fingerprint.
        altered: why its answer is not the logits that the head gives, or empty.
        apart: why the head's weights do not make the logits from the embedding, or empty.
        parts: of several teachers what each offers, by its own names; of their student, what it offers by the names that each one's have.
        unread: why it has no stages though it gives tokens, or empty.
    """

    name: str
    taps: tuple[TapSpec, ...]
    embedding: int
    classes: int
    head: str = ""
    overstepped: str = ""
    labels: tuple[str, ...] = ()
    version: int = 1
    altered: str = ""
    apart: str = ""
    parts: tuple[NetSpec, ...] = ()
    unread: str = ""

    def tap(self, name: str) -> TapSpec:
        """The tap of that name.

        Raises:
            ValueError: the network has none of that name; the message lists those it has.
        """
        for tap in self.taps:
            if tap.name == name:
                return tap
        raise ValueError(f"{self.name} has no tap {name!r}; it has: {', '.join(t.name for t in self.taps) or 'none'}")

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages' last taps in order: ``stage1``, ``stage2``, ..."""
        names = [tap.name for tap in self.taps if re.fullmatch(r"stage\d+", tap.name)]
        return tuple(sorted(names, key=lambda name: int(name.removeprefix("stage"))))

    @classmethod
    def of(cls, outputs: Outputs, name: str = "network") -> NetSpec:
        """The spec of a network known only by its outputs, for a method in a loop of one's own."""
        taps = tuple(TapSpec(tap, m.shape[1], m.shape[2], m.shape[3], tap) for tap, m in outputs.maps.items())
        return cls(name, taps, outputs.embedding.shape[1], outputs.logits.shape[1])


@dataclass(frozen=True)
class DataSpec:
    """What a method or a model may know about the data: sizes, no images."""

    name: str
    n_train: int
    classes: int
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class MethodContext:
    """What does not change while students train. A method gets it once, before training, and of it only what its ``needs`` name.

    Attributes:
        head: the teacher's classifier: weight [K, D] and bias [K].
        norms: tap before a ReLU -> weight [C] and bias [C] of the teacher's batch normalisation that computes it.
        class_means: [K, D] the mean of the teacher's embeddings over the training images of each class, neither cropped nor mirrored.
        labels: [n] class numbers of the training images, which ``Batch.indices`` index; ``NO_LABEL`` for an image that has none.
    """

    head: tuple[Tensor, Tensor] | None = None
    norms: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    class_means: Tensor | None = None
    labels: Tensor | None = None


NO_LABEL = -1  # stands for the class number of an image without a label


class Targets(NamedTuple):
    """What the task's loss is computed from if images may have no class, or two, or if classes weigh differently. Methods do not see it.

    Attributes:
        labels: [N] class numbers, ``NO_LABEL`` for an image that has none.
        counted: scalar by which the sum over the images is divided: the number of images that have a label, or if classes have weights and
            nothing is mixed the sum of these images' weights; of a part of a batch its share of the whole batch's. 1 if none has a label.
        partners: [N] class numbers of the images that are mixed in; None if nothing is mixed.
        share: [1] the share of each image in its mixture; None if nothing is mixed.
        weights: [K] what each class weighs; None if all weigh the same.
    """

    labels: Tensor
    counted: Tensor
    partners: Tensor | None = None
    share: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """What a step knows besides the images.

    Attributes:
        labels: [N] class numbers; None if the images are mixed, or drawn from a set in which some or all have none.
        indices: [N] positions in the training set, for a mixed image that of its first; None outside of training.
        epoch: scalar, 0-based epoch of the whole run, on the device; None outside of training.
        peers: outputs of the students that teach this one and are taught by it, in train mode and with their gradients.
        targets: what the task's loss is computed from if not from ``labels``; never given to a method. Without either there is no task.
    """

    labels: Tensor | None
    indices: Tensor | None = None
    epoch: Tensor | None = None
    peers: tuple[Outputs, ...] = ()
    targets: Targets | None = None
