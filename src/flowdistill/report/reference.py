"""The reference log: what it reports of every run, how it was made, and where that is written. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SOURCE = "https://github.com/hankyul2/KnowledgeDistillation"
"""Its README has the means, its ``docs/baseline.md``, ``logit.md``, ``st.md``, ``at.md``, ``at_st.md`` and ``fsp.md`` the single runs."""

PAGES = ("base", "logits", "kd", "at", "at+kd", "fsp")
"""Its methods by their names here: it calls kd ST, and at+kd ST + AT."""


@dataclass(frozen=True)
class Setting:
    """A network on a data set of the reference log.

    Attributes:
        minutes: of an FSP run on its GPU, from one start to the next.
        runs: method -> the accuracy of every run, percent of 9,984 test images at the best epoch on test.
    """

    model: str
    data: str
    minutes: int
    runs: Mapping[str, Sequence[float]] = field(compare=False)

    @property
    def name(self) -> str:
        """``resnet20-cifar10``."""
        return f"{self.model}-{self.data}"

    def figure(self, method: str) -> float:
        """The mean of a method's runs, with one decimal as the reference prints it."""
        return round(statistics.fmean(self.runs[method]), 1)


SETTINGS = (
    Setting(
        "resnet20",
        "cifar10",
        48,
        {
            "base": (92.0573, 91.9972, 91.8369),
            "logits": (92.51803, 92.48798, 92.52805),
            "kd": (92.94872, 92.64824, 92.82853),
            "at": (91.79688, 92.15746, 91.78686),
            "at+kd": (92.53806, 92.54808, 92.74840),
            "fsp": (91.95713, 91.89703, 92.28766),
        },
    ),
    Setting(
        "resnet20",
        "cifar100",
        46,
        {
            "base": (67.528, 67.7284, 67.5982),
            "logits": (69.26082, 69.27084, 69.10056),
            "kd": (69.78165, 69.72156, 70.10217),
            "at": (68.47957, 67.94872, 68.76002),
            "at+kd": (68.61979, 68.55970, 68.84015),
            "fsp": (68.00881, 67.96875, 68.11899),
        },
    ),
    Setting(
        "resnet110",
        "cifar10",
        131,
        {
            "base": (91.8269, 93.0689, 92.6482),
            "logits": (94.23077, 94.3109, 94.03045),
            "kd": (93.54968, 94.16066),
            "at": (93.20914, 93.29928, 93.40945),
            "at+kd": (93.44952, 93.91026),
            "fsp": (92.19752, 92.47797, 93.46955),
        },
    ),
    Setting(
        "resnet110",
        "cifar100",
        129,
        {
            "base": (71.264, 71.7348, 71.7648),
            "logits": (72.49599, 71.40425, 71.42428),
            "kd": (74.15865, 74.10857),
            "at": (72.66627, 72.9968, 72.27564),
            "at+kd": (73.59776, 74.13863, 73.31731),
            "fsp": (73.27724, 73.36739, 71.90505),
        },
    ),
)

DEPARTURES = """\
- Its teacher was never put in eval mode, so that its batch statistics drifted while it taught. Ours is in eval mode and frozen.
- Its stem was a 7x7 convolution with padding 1 (maps of 28, 14 and 7 pixels). Ours is the 3x3 of He et al. 2016 (32, 16 and 8).
- It dropped the last partial test batch and counted 9,984 of 10,000 images. We count every image.
- It picked the best epoch by looking at test. Here that is labelled `best`; `last` selects nothing."""
