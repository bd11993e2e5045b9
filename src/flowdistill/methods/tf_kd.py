"""tf_kd: a virtual teacher, sure of the label and undecided among the other classes, in the place of a trained one.

The authors' code leaves the student at temperature 1, has no factor T^2 and averages over the classes too; ``mode="paper"`` softens both
sides. ``train.label_smoothing`` smooths the labels of the task itself, of any method, and has no temperature; take that for plain label
smoothing, and tf_kd for this paper. torchdistill's "tfkd" is another thing: kd from a copy of the student that was trained before.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..types import Batch, NetSpec, Outputs
from .base import Method, MethodOptions, Paper, at_least_float32, register
from .dkd import given_labels

Mode = Literal["code", "paper"]


def tf_kd_loss(student: Tensor, labels: Tensor, temperature: float = 20.0, sure: float = 0.99, mode: Mode = "code") -> Tensor:
    """KL(q || p_s) with q = softmax(p_d / T), where p_d[y] = sure and p_d[k] = (1 - sure) / (K - 1) for the other classes.

    Yuan et al. 2020, equation 9, without its factor alpha, which is the weight. code: p_s = softmax(z), mean over batch and classes, as in
    the authors' code. paper: T^2 KL(q || p_s) with p_s = softmax(z / T), sum over the classes, mean over the batch, as in kd. In both
    the virtual teacher's probabilities p_d stand in the place of logits. Computed in at least float32.

    Args:
        student: [N, K] logits, K above 1.
        labels: [N] class numbers.
        temperature: T.
        sure: the virtual teacher's probability of the label.
        mode: ``code`` or ``paper``.

    Returns:
        A scalar.

    Raises:
        ValueError: there is one class, so the virtual teacher has no others.
    """
    logits, classes = at_least_float32(student), student.shape[1]
    if classes < 2:
        raise ValueError(f"the virtual teacher tells a label from other classes; the student gives {tuple(student.shape)}, with one class")
    virtual = torch.full_like(logits, (1 - sure) / (classes - 1)).scatter(1, labels[:, None], sure)
    log_q = F.log_softmax(virtual / temperature, dim=1)
    log_s = F.log_softmax(logits if mode == "code" else logits / temperature, dim=1)
    loss = F.kl_div(log_s, log_q, reduction="batchmean", log_target=True)
    return loss / classes if mode == "code" else loss * temperature**2


class TFKDOptions(MethodOptions):
    """Options of tf_kd."""

    T: float = Field(20.0, gt=0, strict=True)  # the authors' code for ResNet-18 on CIFAR-100; 40 for MobileNetV2, 10 for ShuffleNetV2
    sure: float = Field(0.99, gt=0, lt=1, strict=True)  # the authors' code
    mode: Mode = "code"  # the authors' code, whose weights belong to it


@register
class TFKD(Method):
    """No teacher: the student is drawn to probabilities that smooth its labels."""

    name = "tf_kd"
    paper = Paper(
        "L. Yuan, F. E. H. Tay, G. Li, T. Wang, J. Feng",
        "Revisiting Knowledge Distillation via Label Smoothing Regularization",
        "CVPR",
        2020,
        "https://arxiv.org/abs/1909.11723",
    )
    kind = "logits"
    terms = ("tf_kd",)
    vanishes_at_match = False
    uses_labels = True
    uses_teacher = False
    Options = TFKDOptions
    options: TFKDOptions

    def __init__(self, options: Any = None, *, student: NetSpec, **_: Any) -> None:
        super().__init__(options)
        if student.classes < 2:
            raise ValueError(f"{self.name}: {student.name} has one class, but the virtual teacher needs others; choose other data")

    @classmethod
    def default_weights(cls, options: Any) -> dict[str, float]:
        """code: 10, the authors' alpha 0.1 times their multiplier 100 for ResNet-18, their task weight 0.9 being 1 here. paper: alpha."""
        return {"tf_kd": 10.0 if options.mode == "code" else 0.1}

    def forward(self, student: Outputs, teacher: Outputs | None = None, batch: Batch | None = None) -> dict[str, Tensor]:
        """``tf_kd``; the teacher is not looked at."""
        chosen = self.options
        return {"tf_kd": tf_kd_loss(student.logits, given_labels(batch, self.name), chosen.T, chosen.sure, chosen.mode)}
