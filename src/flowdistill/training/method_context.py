"""What methods are told once before training: parts of the teacher, and of the training images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import UserError
from ..data.interfaces import Supply
from ..device import Precision
from ..methods import Needs
from ..models import Network
from ..models.joined import Joined
from ..types import MethodContext, numbered, of_number
from .evaluate import answering
from .teacher import teach


def gather(needs: Needs, teacher: Network | None, data: Supply, precision: Precision) -> MethodContext:
    """The parts of the context that are needed; without a teacher, only those that need none.

    Raises:
        UserError: the teacher's classifier is no linear layer, or a part that comes from the teacher is not finite.
    """
    labels = data.labels if "labels" in needs.context else None
    if teacher is None:
        return MethodContext(labels=labels)
    means = class_means(teacher, data, precision) if "class_means" in needs.context else None
    context = replace(of_teacher(needs, teacher), class_means=means, labels=labels)
    parts = {"classifier": context.head or (), "mean embedding of a class": () if means is None else (means,)}
    parts |= {f"batch normalisation before the ReLU of {tap.removesuffix('.pre')}": pair for tap, pair in context.norms.items()}
    for part, tensors in parts.items():
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise UserError(f"teacher {teacher.spec.name}: its {part} is not finite; mend the teacher, or choose another")
    return context


def of_teacher(needs: Needs, teacher: Network) -> MethodContext:
    """The parts of the context that come from the teacher alone; of several, their batch normalisations alone."""
    if isinstance(teacher, Joined):
        norms: dict[str, tuple[Tensor, Tensor]] = {}
        for number, one in enumerate(teacher.parts, 1):
            own = needs._replace(teacher=frozenset(of_number(dict.fromkeys(needs.teacher), number)))
            norms |= {numbered(tap, number): pair for tap, pair in of_teacher(own, one).norms.items()}
        return MethodContext(norms=norms)
    return MethodContext(
        head=_head(teacher) if "head" in needs.context else None,
        norms=_norms(teacher, needs) if "norms" in needs.context else {},
    )


def _head(teacher: Network) -> tuple[Tensor, Tensor]:
    head = teacher.body.get_submodule(teacher.spec.head)
    if not isinstance(head, nn.Linear):
        raise UserError(f"the classifier of {teacher.spec.name} is a {type(head).__name__}, not one linear layer; choose another teacher")
    return _affine(head)


def _norms(teacher: Network, needs: Needs) -> dict[str, tuple[Tensor, Tensor]]:
    paths = {tap: teacher.spec.tap(tap).norm for tap in needs.teacher}
    return {tap: _affine(teacher.body.get_submodule(path)) for tap, path in paths.items() if path}


def _affine(module: Any) -> tuple[Tensor, Tensor]:
    """Copies of a module's weight (which may be computed from others) and bias (0 if it has none). A teacher in bf16 casts its own."""
    weight = module.weight.detach().clone()
    return weight, torch.zeros_like(weight[:, 0]) if module.bias is None else module.bias.detach().clone()


def class_means(teacher: Network, data: Supply, precision: Precision) -> Tensor:
    """[K, D] the mean of the teacher's embeddings over each class's training images, in eval mode, without cropping or mirroring."""
    assert not teacher.training
    sums = torch.zeros(data.spec.classes, teacher.spec.embedding, device=data.device)
    counts = torch.zeros_like(sums[:, 0], dtype=torch.int64)
    for step, (images, labels) in enumerate(data.train_eval.batches()):
        with answering(teacher, "class means", step, data.device):
            sums.index_add_(0, labels, teach(teacher, images, precision).embedding.float())
        counts += torch.bincount(labels, minlength=len(counts))
    return sums / counts.clamp(min=1)[:, None]
