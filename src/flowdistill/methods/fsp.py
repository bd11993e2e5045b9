"""fsp: the flow of solution procedure, the heart of this package (docs/FSP.md).

For two feature maps of one network, G holds the inner product of every channel of the first with every channel of the second:
how the features flow from one layer to the next. The student's matrices are pulled to the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..config import MAX_EPOCHS
from ..device import full_precision
from ..types import Batch, NetSpec, Outputs, TapSpec
from .base import Method, MethodOptions, Needs, Paper, Phase, at_least_float32, paired_stages, register, same_shape, then_the_task

Pool = Literal["max", "avg"]
Reduction = Literal["mean", "sum"]
Pair = tuple[Tensor, Tensor]


def fsp_matrix(first: Tensor, second: Tensor) -> Tensor:
    """The FSP matrix of two maps of equal size: G[n, i, j] = 1/(H W) sum_{y,x} first[n, i, y, x] second[n, j, y, x].

    Yim et al. 2017, eq. 1. One batched matrix product in at least float32.

    Args:
        first: [N, C, H, W].
        second: [N, D, H, W].

    Returns:
        [N, C, D].

    Raises:
        ValueError: the maps differ in batch, height or width, or do not have four dimensions.

    Example:
        >>> import torch
        >>> from flowdistill import fsp_matrix
        >>> first = torch.tensor([[[[1.0, 2.0]], [[0.0, 4.0]]]])  # 2 channels of 1x2
        >>> second = torch.tensor([[[[3.0, 1.0]]]])  # 1 channel
        >>> fsp_matrix(first, second)
        tensor([[[2.5000],
                 [2.0000]]])
    """
    if first.dim() != 4 or second.dim() != 4 or first.shape[0] != second.shape[0] or first.shape[2:] != second.shape[2:]:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise ValueError(f"fsp_matrix wants [N, C, H, W] and [N, D, H, W], got {shapes}; match_sizes brings sizes together")
    first, second = (at_least_float32(features).permute(0, 2, 3, 1).flatten(1, 2) for features in (first, second))  # [N, H W, channels]
    with full_precision(first.device):  # the product would go back to half precision
        return first.transpose(1, 2) @ second / first.shape[1]


def match_sizes(first: Tensor, second: Tensor, pool: Pool = "max") -> Pair:
    """Pool the larger of two maps to the height and width of the smaller."""
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    return pooled(first, size, pool), pooled(second, size, pool)


def pooled(x: Tensor, size: tuple[int, int], pool: Pool) -> Tensor:
    """[N, C, H, W] -> [N, C, H', W'] by adaptive pooling, which repeats values if the map is smaller than ``size``."""
    height, width = x.shape[2:]
    if (height, width) == size:
        return x
    if height % size[0] == 0 and width % size[1] == 0:  # equal to adaptive pooling, and deterministic on a GPU
        window = (height // size[0], width // size[1])
        return F.max_pool2d(x, window) if pool == "max" else F.avg_pool2d(at_least_float32(x), window)
    return F.adaptive_max_pool2d(x, size) if pool == "max" else F.adaptive_avg_pool2d(at_least_float32(x), size)


def fsp_loss(student: Sequence[Pair], teacher: Sequence[Pair], *, pool: Pool = "max", reduction: Reduction = "mean") -> Tensor:
    """Squared difference of the FSP matrices G, mean over the batch. Computed in at least float32.

    ``sum`` (Yim et al. 2017, eq. 2, with every lambda 1): 1/N sum over pairs, n, i, j of (G_t - G_s)^2.
    ``mean``: the same, but each pair is divided by its matrix's C D entries and the P pairs are averaged:
    1/P sum over pairs of 1/(N C D) sum over n, i, j of (G_t - G_s)^2. For ResNets of 16/32/64 channels, paired stem-stage1,
    stage1-stage2, stage2-stage3, the entries are 256, 512 and 2048, so a weight means something else under each.

    Args:
        student, teacher: pairs of maps ([N, C, H, W], [N, D, H', W']); the channels of a pair agree between the two networks,
            the sizes need not.
        pool: how the larger map of a pair is brought to the smaller's size, ``max`` or ``avg``.
        reduction: ``mean`` or ``sum``.

    Returns:
        A scalar.

    Raises:
        ValueError: batch or channels of a pair differ between the networks, their numbers of pairs differ or are 0, or pool or reduction
            is unknown.

    Example:
        >>> import torch
        >>> from flowdistill import fsp_loss
        >>> student = [(torch.ones(8, 16, 32, 32), torch.ones(8, 32, 16, 16))]
        >>> teacher = [(torch.ones(8, 16, 32, 32), 3 * torch.ones(8, 32, 16, 16))]  # every entry of G is 3, of the student's 1
        >>> fsp_loss(student, teacher)
        tensor(4.)
        >>> fsp_loss(student, teacher, reduction="sum")  # 16 x 32 entries
        tensor(2048.)
    """
    if pool not in get_args(Pool) or reduction not in get_args(Reduction) or not student:
        raise ValueError(f"fsp_loss wants pool max or avg, reduction mean or sum, and at least one pair; got {pool!r}, {reduction!r}")
    losses = []
    for pair_s, pair_t in zip(student, teacher, strict=True):
        ours, theirs = (fsp_matrix(*match_sizes(*pair, pool)) for pair in (pair_s, pair_t))
        same_shape(ours, theirs)
        square = (theirs - ours).square()
        losses.append(square.mean() if reduction == "mean" else square.sum((1, 2)).mean())
    total = torch.stack(losses)
    return total.mean() if reduction == "mean" else total.sum()


PRESETS: dict[str, dict[str, str]] = {
    "ours": {"pairing": "cross", "pool": "max", "reduction": "mean", "schedule": "joint"},
    "log": {"pairing": "cross", "pool": "avg", "reduction": "mean", "schedule": "joint"},
    "kd-zoo": {"pairing": "cross", "pool": "avg", "reduction": "mean", "schedule": "two-stage"},
    "paper": {"pairing": "section", "pool": "max", "reduction": "sum", "schedule": "two-stage"},
}
"""What each published system computes. ``paper`` is one of two readings of its text: see docs/FSP.md."""


class FSPOptions(MethodOptions):
    """Options of fsp; what is left out comes from the preset.

    ``pairing``: ``cross`` pairs stem-stage1, stage1-stage2, stage2-stage3; ``section`` pairs the first conv-BN-ReLU inside a stage
    (``stage1.first``) with the output of its last block. ``adapter``: ``conv1x1`` maps the student's channels to the teacher's at
    every tap where they differ. ``stage_epochs`` and ``stage_lr`` belong to stage one of ``schedule=two-stage``.
    """

    preset: Literal["ours", "log", "kd-zoo", "paper"] = "ours"
    pairing: Literal["cross", "section"] = "cross"
    pool: Pool = "max"
    reduction: Reduction = "mean"
    schedule: Literal["joint", "two-stage"] = "joint"
    adapter: Literal["none", "conv1x1"] = "none"
    stage_epochs: int = Field(54, ge=1, le=MAX_EPOCHS, strict=True)  # 21k iterations at batch 128 (paper, section 4.1); 50 under kd-zoo
    stage_lr: float = Field(1e-2, gt=0, strict=True)  # 1e-3 under sum (paper, section 4.1); KD-Zoo's 1e-2 under mean

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        preset = values.get("preset", "ours") if isinstance(values, dict) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return values
        filled: dict[str, Any] = {**PRESETS[preset], **values}
        stage = {"stage_epochs": 50 if preset == "kd-zoo" else 54, "stage_lr": 1e-3 if filled["reduction"] == "sum" else 1e-2}
        for key, default in stage.items():
            if filled["schedule"] == "joint" and filled.get(key, default) != default:
                raise ValueError(f"{key} belongs to schedule=two-stage; set that too, or leave it out")
        return {**stage, **filled}

    def variant(self) -> str:
        """The preset, and what differs from it."""
        usual = FSPOptions(preset=self.preset).model_dump()
        unused = {"stage_epochs", "stage_lr"} if self.schedule == "joint" else set()
        return ", ".join([self.preset, *(f"{k}={v}" for k, v in self.model_dump(exclude=unused).items() if v != usual[k])])

    def milestones(self) -> tuple[float, ...]:
        """When stage one's rate falls: at 11k and 16k of 21k iterations (paper), at epochs 30 and 40 of 50 (KD-Zoo)."""
        return (0.6, 0.8) if self.preset == "kd-zoo" else (11 / 21, 16 / 21)


@register
class FSP(Method):
    """The student's flow matrices are pulled to the teacher's."""

    name = "fsp"
    paper = Paper(
        "J. Yim, D. Joo, J. Bae, J. Kim",
        "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning",
        "CVPR",
        2017,
        "https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html",
    )
    terms = ("fsp",)
    Options = FSPOptions
    options: FSPOptions

    def __init__(self, options: Any = None, *, student: NetSpec, teacher: NetSpec, **_: Any) -> None:
        super().__init__(options)
        stages = paired_stages(student, teacher, self.name)
        self.pairs = self._pairs(stages, student, teacher)
        taps = sorted({tap for pair in self.pairs for tap in pair})
        self.needs = Needs(frozenset(taps), frozenset(taps))
        self.adapters = nn.ModuleDict()
        for tap in taps:
            ours, theirs = student.tap(tap), teacher.tap(tap)
            if ours.channels == theirs.channels:
                continue
            if self.options.adapter == "none":
                raise ValueError(
                    f"fsp: tap {tap!r} is {ours.shape} in {student.name} and {theirs.shape} in {teacher.name}, and the matrices need "
                    f"equal channels; set options.fsp.adapter=conv1x1 or choose networks of equal width"
                )
            self.adapters[_module_name(tap)] = nn.Conv2d(ours.channels, theirs.channels, 1, bias=False)

    def _pairs(self, stages: Sequence[str], student: NetSpec, teacher: NetSpec) -> list[tuple[str, str]]:
        if self.options.pairing == "cross":
            return list(zip(("stem", *stages[:-1]), stages, strict=True))
        pairs = [(f"{stage}.first", stage) for stage in stages]
        for spec in (student, teacher):
            for first, last in pairs:
                if _same_tensor(spec.tap(first), spec.tap(last)):
                    raise ValueError(
                        f"fsp: in {spec.name} the taps {first!r} and {last!r} ({spec.tap(last).shape}) are one tensor, so pairing=section "
                        f"has no flow to match; set options.fsp.pairing=cross"
                    )
        return pairs

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """mean: 1 (KD-Zoo, and a measured gradient of 3 to 12 times the task's). sum: 1e-3, since at 1 its gradient is 10^4 times
        the task's and training diverges. preset=log: 1/3, as the reference log divides the sum over three pairs by 9.
        """
        if options.reduction == "sum":
            return {"fsp": 1e-3}
        return {"fsp": 1 / 3 if options.preset == "log" else 1.0}

    @classmethod
    def phases(cls, options: Any) -> tuple[Phase, ...]:
        """joint, or FSP alone without the head and then the task alone (paper, section 3.4)."""
        if options.schedule == "joint":
            return (Phase("joint"),)
        first = Phase("fsp", options.stage_epochs, options.stage_lr, options.milestones(), only=frozenset({"fsp"}), head=False)
        return then_the_task(first)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch | None = None) -> dict[str, Tensor]:
        """``fsp``."""
        ours = {tap: self._adapted(tap, student.maps[tap]) for tap in sorted(self.needs.student)}
        loss = fsp_loss(
            [(ours[first], ours[second]) for first, second in self.pairs],
            [(teacher.maps[first], teacher.maps[second]) for first, second in self.pairs],
            pool=self.options.pool,
            reduction=self.options.reduction,
        )
        return {"fsp": loss}

    def _adapted(self, tap: str, features: Tensor) -> Tensor:
        name = _module_name(tap)
        if name not in self.adapters:
            return features
        adapter = self.adapters[name]
        assert isinstance(adapter, nn.Conv2d)
        adapted: Tensor = adapter(features.to(adapter.weight.dtype))
        return adapted


def _module_name(tap: str) -> str:
    return tap.replace(".", "_")  # a module's name holds no dot


def _same_tensor(a: TapSpec, b: TapSpec) -> bool:
    return bool(a.module) and a.module == b.module
