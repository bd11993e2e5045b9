"""A GPU that is not there: tensors that say they lie on ``cuda:0`` and hold nothing, and a watch that lists what a step does with them.

Shapes, strides, types and devices are PyTorch's own (``FakeTensorMode``), values are not there. So a step shows here what a CUDA graph can
not hold: work on the CPU, copies from and to it, waiting for the device, tensors on another GPU. What a kernel computes it does not show.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEMORY = 80 << 30  # bytes that the GPU says are free

WAITS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "histc"),
    *("_linalg_eigh", "_linalg_svd", "linalg_eig", "_linalg_eigvals", "linalg_lstsq", "_linalg_check_errors"),
}
"""Operations whose host code waits for a GPU: the shape of what they give, or their answer, is a matter of values."""

NO_KERNEL = {
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "resize_", "set_"),
    *("_record_function_enter_new", "_record_function_exit"),
}
"""Operations that launch nothing. Those that give a view of what they got are found by their schemas."""

MASKS = (torch.bool, torch.uint8)

FUSED = {"_fused_sgd_": ("SGD", 1), "_fused_adamw_": ("AdamW", 2)}
"""Steps of optimisers -> whose each is, and how many lists of what is remembered follow the gradients."""


class Watch(TorchDispatchMode):
    """Counts the operations inside, by name, and lists what a captured step may not do.

    Attributes:
        device: where all tensors are to be.
        launches: how often each operation that computes or copies was called; one may be several kernels.
        faults: what a graph can't hold, and how often.
        fused: how many parameters fused optimisers moved.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.launches, self.faults = Counter[str](), Counter[str]()
        self.fused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":  # a question, such as on which device a tensor is
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given = _tensors((args, kwargs))
        if launches(func):
            self.launches[name] += 1
        if name in FUSED:
            self.fused += len(args[0])
            kind, remembered = FUSED[name]
            momenta = [value for values in args[2 : 2 + remembered] for value in values]
            self.faults.update(fused_faults(kind, self.device, args[0], args[1], momenta, kwargs["lr"]))
        if any(tensor.is_cuda for tensor in given) and waits(name, args):
            self.faults[f"waits for the device: {name}"] += 1
        out = func(*args, **kwargs)
        self._look(name, given, _tensors(out))
        return out

    def _look(self, name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        before, after = ({tensor.device.type for tensor in tensors} for tensors in (given, made))
        if "cuda" in before and "cpu" in after:
            self.faults[f"copies to the CPU: {name}"] += 1
        elif "cpu" in before and "cuda" in before | after:
            self.faults[f"takes from the CPU: {name}"] += 1
        elif "cpu" in before | after:
            self.faults[f"computes on the CPU: {name}"] += 1
        for index in sorted({tensor.device.index for tensor in (*given, *made) if tensor.is_cuda} - {self.device.index}, key=str):
            self.faults[f"on cuda:{index}: {name}"] += 1

    def forget(self) -> None:
        """Count from here on."""
        self.launches.clear()
        self.faults.clear()
        self.fused = 0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@functools.cache
def launches(func: Any) -> bool:
    """Whether an operation gives a GPU something to do."""
    named = [argument.alias_info for argument in func._schema.arguments if argument.alias_info is not None]
    is_view = bool(named) and not any(alias.is_write for alias in named)
    return not is_view and func.overloadpacket.__name__ not in NO_KERNEL


def waits(name: str, args: Sequence[Any]) -> bool:
    """Whether the host waits for the GPU. It does where an index is a mask too: it has to ask how many elements that chooses."""
    if name in WAITS:
        return True
    masks = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
    return any(isinstance(mask, Tensor) and mask.dtype in MASKS for mask in masks)


def fused_faults(
    kind: str,
    device: torch.device,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    lr: Tensor | float,
) -> list[str]:
    """What of its arguments a fused kernel would read wrongly, or refuse: it walks over all memories alike.

    Args:
        momenta: all that is remembered of all parameters, one kind after the other.
    """
    found = []
    if not isinstance(lr, Tensor) or lr.device != device or lr.dim() != 0:
        found.append(f"fused {kind}: the rate is no scalar on {device}")
    for what, values in (("gradient", gradients), ("momentum", momenta)):
        for parameter, value in zip(itertools.cycle(parameters), values, strict=False):
            for trait in ("device", "dtype", "shape"):
                if getattr(value, trait) != getattr(parameter, trait):
                    found.append(f"fused {kind}: a {what} of another {trait}")
            if value.stride() != parameter.stride():
                found.append(f"fused {kind}: a {what} of another stride")
    return found


class _Fake(FakeTensorMode):
    """Fake tensors that answer where PyTorch's refuse to, for lack of values: a watch above sees that they were asked."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.overloadpacket.__name__ in FUSED:  # they have no form for tensors without values
            return None
        if kwargs and kwargs.get("device") == torch.device("cuda"):  # which that is, PyTorch's own would remember of the first call
            kwargs = {**kwargs, "device": torch.device("cuda", torch.cuda.current_device())}
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if func.overloadpacket.__name__ == "all":
                out.holds = True
            if func.overloadpacket.__name__ == "convolution":
                return _laid_out([out], args[0:2])[0]
            if func.overloadpacket.__name__ == "convolution_backward":
                return _laid_out(out, args[1:3])
            return out
        except (DataDependentOutputException, DynamicOutputShapeException):
            answer = ANSWERS.get(func.overloadpacket.__name__)
            if answer is None:
                raise
            return answer(func, *args, **(kwargs or {}))


def _laid_out(made: Sequence[Tensor | None], images_and_weights: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """What a convolution gives as cuDNN lays it out: channels_last where its images or weights are so. Without cuDNN a fake one is not."""
    if not any(_channels_last(value) for value in images_and_weights):
        return tuple(made)
    return tuple(torch.empty_like(one, memory_format=torch.channels_last) if one is not None and one.dim() == 4 else one for one in made)


def _channels_last(value: Tensor) -> bool:
    if value.dim() != 4:
        return False
    _, channels, height, width = value.shape
    contiguous = (channels * height * width, height * width, width, 1)  # as one pixel may be told to be in either way
    return value.is_contiguous(memory_format=torch.channels_last) and value.stride() != contiguous


def _scalar(func: Any, value: Tensor) -> float | bool:
    """A number that one may divide by; what is asked of all holds, any other condition does not: so all that is checked is in order."""
    if value.dtype == torch.bool:
        return hasattr(value, "holds")
    return 1.0 if value.dtype.is_floating_point else 1


def _places(func: Any, value: Tensor) -> Tensor:
    return value.new_empty((value.numel(), value.dim()), dtype=torch.int64)


def _chosen(func: Any, value: Tensor, mask: Tensor) -> Tensor:
    return value.new_empty(mask.numel())


def _counts(func: Any, value: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return value.new_empty(max(minlength, 10), dtype=torch.int64)


def _indexed(func: Any, value: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """Each mask stands for the places of all its elements."""
    found: list[Tensor | None] = []
    for one in indices:
        masks = isinstance(one, Tensor) and one.dtype in MASKS
        found += _places(func, one).unbind(1) if masks else [one]
    return func(value, found)


ANSWERS = {"_local_scalar_dense": _scalar, "nonzero": _places, "masked_select": _chosen, "bincount": _counts, "index": _indexed}


def gradients(total: Tensor, inputs: Sequence[Tensor], *, allow_unused: bool = False, **_: Any) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` of a scalar, whose engine wants a driver: the same nodes, called one by one."""
    found: dict[int, Tensor] = {}
    given: dict[Any, list[Tensor | None]] = {total.grad_fn: [None] * len(total.grad_fn._input_metadata)}
    given[total.grad_fn][total.output_nr] = torch.ones_like(total)
    with torch.no_grad():
        for node in _in_order(total.grad_fn, {id(one) for one in inputs}):
            arguments = given.pop(node)
            if hasattr(node, "variable"):
                found[id(node.variable)] = arguments[0]
                continue
            results = getattr(node, "apply", node)(*arguments)  # a node in Python has its backward in ``apply``
            results = results if isinstance(results, tuple) else (results,)
            for result, (after, number) in zip(results, node.next_functions, strict=True):
                if after is None or result is None:
                    continue
                place = given.setdefault(after, [None] * len(after._input_metadata))
                wanted = after._input_metadata[number]
                result = result if result.shape == wanted.shape else result.sum_to_size(wanted.shape)
                result = result.to(wanted.dtype)
                place[number] = result if place[number] is None else place[number] + result
    assert allow_unused or all(id(one) in found for one in inputs)
    return tuple(found.get(id(one)) for one in inputs)


def _in_order(root: Any, inputs: set[int]) -> list[Any]:
    """The nodes from the loss on that lead to an input, each after all that give to it."""
    leads: dict[Any, bool] = {}
    order: list[Any] = []
    open_: list[tuple[Any, bool]] = [(root, False)]
    while open_:
        node, left = open_.pop()
        if left:
            after = [one for one, _ in node.next_functions if one is not None]
            leads[node] = id(getattr(node, "variable", None)) in inputs or any(leads[one] for one in after)
            order.append(node)
        elif node not in leads:
            leads[node] = False
            open_.append((node, True))
            open_ += [(one, False) for one, _ in node.next_functions if one is not None and one not in leads]
    return [node for node in reversed(order) if leads[node]]


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True, made: dict[int, Any] | None = None) -> nn.Module:
    """``nn.Module._apply``, which ``to`` calls, with new tensors: a fake one can't take another's place. What is shared stays shared."""
    made = {} if made is None else made
    for inner in module.children():
        _apply(inner, change, made=made)
    for tensors in (module._parameters, module._buffers):
        for name, value in tensors.items():
            if value is None:
                continue
            if id(value) not in made:
                changed = change(value.detach())
                made[id(value)] = (nn.Parameter(changed, value.requires_grad) if isinstance(value, nn.Parameter) else changed), value
            tensors[name] = made[id(value)][0]
    return module


def _deepcopy(value: Tensor, made: dict[int, Any]) -> Tensor:
    """``copy.deepcopy`` of a fake tensor, which would else copy the memory that it does not have."""
    if id(value) not in made:
        copied = value.detach().clone()
        made[id(value)] = nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied
    return made[id(value)]


@contextmanager
def fake_cuda(index: int = 0) -> Iterator[Watch]:
    """Inside, ``cuda`` is a GPU of no values, and the watch sees every operation; after it all is as it was."""
    free = patch("torch.cuda.mem_get_info", lambda device=None: (MEMORY, MEMORY))
    current = patch("torch.cuda.current_device", lambda: 0)
    bf16 = patch("torch.cuda.is_bf16_supported", lambda including_emulation=True: True)
    mixed = patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    to = patch.object(nn.Module, "_apply", _apply)
    copied = patch.object(FakeTensor, "__deepcopy__", _deepcopy, create=True)
    backward = patch("torch.autograd.grad", gradients)
    with ExitStack() as stack:
        for change in (free, current, bf16, mixed, to, copied, backward):
            stack.enter_context(change)
        stack.enter_context(_Fake(allow_non_fake_inputs=True))
        yield stack.enter_context(Watch(torch.device("cuda", index)))
