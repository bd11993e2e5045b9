"""A batch in parts, one after the other: the step is that of the whole batch, and memory holds the maps of one part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..types import Batch, Outputs

Part = tuple[Tensor, "Outputs | None", Batch]
Computed = tuple[list["Tensor | None"], list[dict[str, Tensor]]]


def cut(count: int, images: Tensor, teacher_outputs: Outputs | None, batch: Batch) -> Iterator[Part]:
    """A batch [N, ...] in ``count`` parts of N / count images, in order. One part is the batch as it is.

    The mean of the parts' losses is the loss of the whole batch, where that is a mean over images.
    """
    if count == 1:
        yield images, teacher_outputs, batch
        return
    size = len(images) // count
    for start in range(0, size * count, size):
        own = slice(start, start + size)
        yield images[own], None if teacher_outputs is None else _outputs(teacher_outputs, own), _batch(batch, own, count)


def _outputs(outputs: Outputs, own: slice) -> Outputs:
    """Of a teacher, who may lack some."""
    given = [None if value is None else value[own] for value in (outputs.logits, outputs.embedding)]
    return Outputs(*given, {name: value[own] for name, value in outputs.maps.items()})  # type: ignore[arg-type, call-arg]


def _batch(batch: Batch, own: slice, count: int) -> Batch:
    def part(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[own]

    targets = batch.targets
    if targets is not None:  # each part has its share of the count, however many of its own images have a label
        targets = targets._replace(labels=targets.labels[own], counted=targets.counted / count, partners=part(targets.partners))
    return Batch(part(batch.labels), part(batch.indices), batch.epoch, targets=targets)


def mean(parameters: Sequence[nn.Parameter], computed: Iterable[Computed], count: int) -> Computed:
    """The mean of the parts' gradients, added up in the parameters' type, and of their terms. That of one part is as it was."""
    parts = iter(computed)
    gradients, student_terms = next(parts)
    for more, more_terms in parts:
        gradients = [
            one if one is None or other is None else one.to(parameter.dtype) + other.to(parameter.dtype)
            for parameter, one, other in zip(parameters, gradients, more, strict=True)
        ]
        student_terms = [
            {name: value + other[name] for name, value in one.items()} for one, other in zip(student_terms, more_terms, strict=True)
        ]
    if count > 1:
        torch._foreach_div_([gradient for gradient in gradients if gradient is not None], count)
        student_terms = [{name: value / count for name, value in terms.items()} for terms in student_terms]
    return gradients, student_terms
