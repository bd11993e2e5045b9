"""The teacher: frozen, watched, and as cheap as its outputs allow."""

from __future__ import annotations

from collections import Counter, OrderedDict
from copy import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..checks import summary
from ..device import Precision, autocast
from ..methods import Needs
from ..models import Network
from ..types import Outputs
from .teacher_sums import output_names, output_sums


class Teacher:
    """A frozen network in eval mode whose tensors are known, so that a drift can't pass unseen.

    What runs is ``net``: the given network without the parts that no method needs, with every batch normalisation that follows a
    convolution folded into it, and under bf16 with the weights of its convolutions and linear layers cast once.

    Attributes:
        original: the network that was given.
        whole: why it could not be made cheaper, or empty.
        name: its model's.
        output_names: its outputs that methods use, as messages name them: its maps in the order in which it computes them, then the rest.
    """

    def __init__(self, net: Network, needs: Needs, precision: Precision) -> None:
        self.original, self.precision, self.whole = net, precision, ""
        self.name, self.output_names = net.spec.name, output_names(needs, [tap.name for tap in net.spec.taps])
        net.eval().requires_grad_(False)
        self.net: nn.Module = net
        try:
            if net.draws_always or net.unsettled:
                self.whole = "in eval mode it draws random numbers, some of which a trace would keep, or its buffers move"
            else:
                self.net = fold(trim(net, needs), net.memory_format)
        except Exception as error:  # tracing runs the network's own code, which may do anything
            self.whole = summary(error)
        if precision == "bf16" and not self.whole:
            for module in self.net.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.to(torch.bfloat16)
        self._kept = {name: value.clone() for name, value in self.net.state_dict().items()}

    def teach(self, images: Tensor) -> Outputs:
        """Its outputs for images [N, C, H, W]. Logits and embedding are None if no method needs them."""
        return teach(self.net, images, self.precision)

    def output_sums(self, outputs: Outputs) -> dict[str, Tensor]:
        """A scalar for each of ``output_names``, not finite if a value of that output is not. Nothing waits for the device."""
        return output_sums(outputs, self.output_names)

    def check_mode(self) -> None:
        """Raise RuntimeError if the teacher left eval mode or is no longer frozen."""
        if any(module.training for module in self.net.modules()):
            raise RuntimeError("the teacher left eval mode during training")
        if any(parameter.requires_grad for parameter in self.net.parameters()):
            raise RuntimeError("the teacher is no longer frozen")

    def drift(self) -> Tensor:
        """How many of its tensors changed; a scalar that stays on the device. NaN that was NaN before is no change."""
        pairs = [(value, self._kept[name]) for name, value in self.net.state_dict().items()]
        return torch.stack([((value != kept) & ((value == value) | (kept == kept))).any() for value, kept in pairs]).sum()


class _Tracer(fx.Tracer):
    """A tracer that calls the forward hooks of layers too, which the plain one leaves out: a foreign network's taps are such hooks."""

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        output: Any = super().call_module(m, forward, args, kwargs)
        if self.is_leaf_module(m, self.path_of_module(m)):
            for number, hook in m._forward_hooks.items():
                inputs = (args, kwargs) if number in m._forward_hooks_with_kwargs else (args,)
                if (changed := hook(m, *inputs, output)) is not None:
                    output = changed
        return output


def trim(net: Network, needs: Needs) -> fx.GraphModule:
    """The network without the parts that lead to no needed output. It shares its modules with ``net``.

    Raises:
        Exception: the tracer's own, if the network's control flow depends on its input.
    """
    traced = fx.GraphModule(net, _Tracer().trace(net))
    (outputs,) = (node for node in traced.graph.nodes if node.op == "call_function" and node.target is Outputs)
    logits, embedding, maps = outputs.args
    maps = {name: value for name, value in maps.items() if name in needs.teacher}
    outputs.args = (logits if needs.logits else None, embedding if needs.embedding else None, maps)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    for name, module in list(traced.named_modules()):
        if module._forward_hooks:  # they have done their work
            bare = copy(module)
            bare._forward_hooks = OrderedDict()
            traced.add_submodule(name, bare)
    return traced.eval()


def fold(net: fx.GraphModule, memory_format: torch.memory_format) -> fx.GraphModule:
    """Every batch normalisation in eval mode that alone follows a convolution becomes part of it.

    (conv(x) - mean) / sqrt(var + eps) * weight + bias is a convolution; the numbers agree up to rounding. The convolutions are
    copies; the modules of the network that was traced stay as they are.
    """
    calls = Counter(node.target for node in net.graph.nodes if node.op == "call_module")
    for node in list(net.graph.nodes):
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        name = str(before.target)
        convolution, normalisation = net.get_submodule(name), net.get_submodule(str(node.target))
        if type(convolution) is not nn.Conv2d or type(normalisation) is not nn.BatchNorm2d:  # a subclass may do more
            continue
        if calls[before.target] == calls[node.target] == 1:
            folded = fuse_conv_bn_eval(convolution, normalisation).to(memory_format=memory_format)
            net.add_submodule(name, folded.requires_grad_(False))
            node.replace_all_uses_with(before)
            net.graph.erase_node(node)
    net.delete_all_unused_submodules()
    net.recompile()
    return net


@torch.no_grad()
def teach(teacher: nn.Module, images: Tensor, precision: Precision) -> Outputs:
    """The teacher's outputs: eval mode, no gradient."""
    with autocast(images.device, precision):
        outputs: Outputs = teacher(images)
    return outputs
