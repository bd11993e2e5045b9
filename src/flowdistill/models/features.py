"""Networks without a classifier: how what they give becomes pooled features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .watching import Call, Layout, layout_of

HELD = ("pooler_output", "last_hidden_state")  # attributes of an output that hold features, as those of transformers do


class Pooling(NamedTuple):
    """How the output of a network without a classifier becomes features [N, D].

    A tensor [N, D] is that already. Of tokens [N, T, D] the first is taken if it stands before those of the positions, as a class token
    does; else the mean of the positions, as of a map.

    Attributes:
        attribute: where the output holds the tensor; empty if it is the tensor.
        layout: how the tensor is a map; None if it is none.
        registers: whether the tokens before those of the positions are registers alone, and none is a class token.
    """

    attribute: str
    layout: Layout | None
    registers: bool = False

    def __call__(self, output: Any) -> Tensor:
        """The features [N, D] of an output."""
        value: Tensor = getattr(output, self.attribute) if self.attribute else output
        if value.dim() == 2:
            return value
        if self.layout is None:
            return value.mean(1)
        return value[:, 0] if self.layout.prefix and not self.registers else self.layout.map(value).mean((2, 3))


def pooling_of(output: Any, calls: Sequence[Call], net: nn.Module, height: int, width: int) -> Pooling:
    """How what a network gives for images of this size becomes features.

    Args:
        calls: of the pass that gave it, with the layouts that were chosen.

    Raises:
        ValueError: it gives neither features, tokens nor a map.
    """
    attribute = next((name for name in HELD if isinstance(getattr(output, name, None), Tensor)), "")
    value = getattr(output, attribute) if attribute else output
    layouts = (call.layout for call in reversed(calls) if call.output is value)
    layout = next(layouts, layout_of(value, net, height, width))
    if not isinstance(value, Tensor) or not (value.dim() in (2, 3) or (value.dim() == 4 and layout)):
        given = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"it gives {given}, neither logits [N, classes] nor features: [N, D], tokens [N, T, D] or a map [N, C, H, W]")
    registers = any(getattr(module, "has_class_token", None) is False for module in net.modules())  # as timm's networks say
    return Pooling(attribute, layout, registers)
