"""The vocabulary that data, models, methods and training share: what a network offers, and what it gives for a batch.

Torch-free at run time, as config is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Outputs(NamedTuple):
    """What a network gives for a batch, and all that a method sees of it. Of a teacher only what the method's ``needs`` name is there.

    Attributes:
        logits: [N, K] unnormalised class scores.
        embedding: [N, D] the pooled features that feed the classifier.
        maps: tap name -> [N, C, H, W], only the taps that were asked for when the network was built.
    """

    logits: Tensor
    embedding: Tensor
    maps: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class TapSpec:
    """A named intermediate feature map, declared before any image is seen.

    Attributes:
        name: ``stem``, ``stage1``, ``stage1.first``, ...
        channels, height, width: its size for one image.
        module: the last module on the way to it, a ReLU after it included; two taps with one path are one tensor.
        norm: of a map before its ReLU, the batch normalisation that gave it, a shortcut aside; empty where no single one did.
        source: what the network itself calls it, where pairing or the user gave it another name.
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
        """What the network itself calls it."""
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
        classes: K, the number of logits.
        head: path of the module that turns the embedding into logits.
        overstepped: path of a convolution whose stride is larger than its map, so that some of its weights meet padding alone; empty
            where there is none, or nobody looked.
        labels: the names of those classes, where known.
        version: of its taps, raised when a name gives another map than before. Where taps are compared and it is above 1, it is part of a
            run's fingerprint.
        altered: why its answer is not the logits that the head gives, or empty.
        apart: why the head's weights do not make the logits of the embedding, or empty.
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

    def tap(self, name: str) -> TapSpec:
        """One tap by name.

        Raises:
            ValueError: the network has none of that name; the message lists those it has.
        """
        for tap in self.taps:
            if tap.name == name:
                return tap
        raise ValueError(f"{self.name} has no tap {name!r}; it has: {', '.join(t.name for t in self.taps) or 'none'}")

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stage ends in order: ``stage1``, ``stage2``, ..."""
        names = [tap.name for tap in self.taps if re.fullmatch(r"stage\d+", tap.name)]
        return tuple(sorted(names, key=lambda name: int(name.removeprefix("stage"))))

    @classmethod
    def of(cls, outputs: Outputs, name: str = "network") -> NetSpec:
        """The spec of a network seen only through its outputs, for use of a method in one's own loop."""
        taps = tuple(TapSpec(tap, m.shape[1], m.shape[2], m.shape[3], tap) for tap, m in outputs.maps.items())
        return cls(name, taps, outputs.embedding.shape[1], outputs.logits.shape[1])


@dataclass(frozen=True)
class DataSpec:
    """What a method or a model may know of the data: sizes, no images."""

    name: str
    n_train: int
    classes: int
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class MethodContext:
    """What stands still while students train; a method is told once what its ``needs`` name of it.

    Attributes:
        head: the teacher's classifier: weight [K, D] and bias [K].
        norms: tap before a ReLU -> weight [C] and bias [C] of the teacher's batch normalisation that gave it.
        class_means: [K, D] the mean of the teacher's embeddings over the training images of each class, neither cropped nor mirrored.
        labels: [n] class numbers of the training images, in the order of ``Batch.indices``; ``NO_LABEL`` of those that have none.
    """

    head: tuple[Tensor, Tensor] | None = None
    norms: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    class_means: Tensor | None = None
    labels: Tensor | None = None


NO_LABEL = -1  # in the place of an unlabelled image's class number


class Targets(NamedTuple):
    """What the task is computed with where an image is of no class, or of two. Methods do not see it.

    Attributes:
        labels: [N] class numbers, ``NO_LABEL`` where an image has none.
        counted: scalar, how many have one, 1 at least.
        partners: [N] those of the images that are mixed in; None where nothing is mixed.
        share: [1] of each image in its mixture.
    """

    labels: Tensor
    counted: Tensor
    partners: Tensor | None = None
    share: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """What a step knows beside the images.

    Attributes:
        labels: [N] class numbers; None where the images are mixed, or drawn from some that have none.
        indices: [N] positions in the training set, of a mixed image that of its first; None outside of training.
        epoch: scalar, 0-based epoch of the whole run, on the device; None outside of training.
        peers: outputs of the students that teach this one and are taught by it, in train mode and with their gradients.
        targets: what the task is computed with in the place of ``labels``; never given to a method.
    """

    labels: Tensor | None
    indices: Tensor | None = None
    epoch: Tensor | None = None
    peers: tuple[Outputs, ...] = ()
    targets: Targets | None = None
