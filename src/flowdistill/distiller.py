"""A method in one's own loop: a module that gives, for a batch, the loss of a student and its terms."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import methods, models
from .checks import UserError, as_user_error
from .config import DISTILLING, TrainConfig, parse_as
from .data.user_loaders import checked, refuse_other_labels
from .device import full_precision
from .methods import ResolvedMethod
from .models import Network
from .models.foreign import Foreign, refuse_unready, surveyed, uncompiled
from .models.state import kept
from .randomness import seeded
from .runner.pairing import pair
from .runner.plan import refuse_users
from .training.method_context import of_teacher
from .training.optim import trainable_parameters
from .training.step import loss_terms
from .training.task import TASK
from .types import NO_LABEL, Batch, DataSpec, NetSpec, Outputs, Targets

CURE = "use flowdistill.distill"
TEACHER = "teacher."  # how names of its state begin


class Distiller(nn.Module):
    """The loss of a student on a batch, by any method that needs no more than the batch.

    The modules are not copied: the student that was given is trained. It is put into train mode, the teacher into eval mode and frozen.
    Modules that this package did not make have hooks until ``close``, or until the Distiller is gone.

    Its state (``state_dict``) is the student's and the method's. The teacher is not in it, and stays as it is where a state is loaded.

    Attributes:
        student, teacher: the networks with their taps; ``.body`` is the module that was given. A method that needs no teacher has None.
        method: the method, with its adapters.
        phase, weights: the current phase of training, and the weight of each term that counts in it.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        method: str = DISTILLING,
        *,
        images: Tensor | Sequence[int] = (3, 224, 224),
        options: Mapping[str, Mapping[str, Any]] | None = None,
        weights: Mapping[str, float] | None = None,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Pair student and teacher.

        Args:
            teacher, student: modules that give logits [N, K] for images [N, C, H, W], or networks of this package.
            method: a method or a composition such as ``at+kd``.
            images: the shape (C, H, W) of an image, or a batch of them [N, C, H, W].
            options: of each method, such as ``{"kd": {"T": 2.0}}``. Default: the method's.
            weights: of each term. Default: the method's.
            label_smoothing: share of each label that the task spreads over all classes.
            seed: decides the adapters' initial weights.

        Raises:
            UserError: the pair can't work, or the method needs all of the training images or another student.
        """
        super().__init__()
        self.resolved, self.closed = _resolve_method(method, options or {}, weights or {}), False
        self.smoothing = parse_as(TrainConfig, {"label_smoothing": label_smoothing}).label_smoothing
        size = _size(images)
        student_side = _side(student, size, "student")
        teacher_side = self._side_of_teacher(teacher, student, size)
        if teacher_side:
            paired = pair(student_side.spec, teacher_side.spec, student_side.data, teacher_side.data)
            student_side, teacher_side = student_side._replace(spec=paired.student), teacher_side._replace(spec=paired.teacher)
        teacher_spec = teacher_side.spec if teacher_side else None
        with as_user_error(), seeded(seed, "adapters"):
            self.method = methods.build(self.resolved, student=student_side.spec, teacher=teacher_spec, data=student_side.data)
        needs = self.method.needs
        if unknown := sorted(needs.context - {"head", "norms"}):
            context = unknown[0].replace("_", " ")
            raise UserError(f"method {self.resolved.name!r} needs the {context} of all training images; {CURE}")
        self.size = size
        self.student = student_side.build(student_side.spec, tuple(sorted(needs.student)))
        self.teacher = teacher_side.build(teacher_side.spec, tuple(sorted(needs.teacher))) if teacher_side else None
        self._given = (student, teacher if teacher_side else None)
        self._hooks = weakref.finalize(self, _release, self.student, self.teacher)
        self.register_state_dict_post_hook(_leave_teacher_out)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_keep_teacher)  # type: ignore[no-untyped-call]
        if self.teacher is not None:
            self.teacher.requires_grad_(False)
            self.method.setup(of_teacher(needs, self.teacher))
        self.method.to(next(self.student.parameters()).device)
        self.begin_phase(0)
        self.train()

    def _side_of_teacher(self, teacher: nn.Module | None, student: nn.Module, size: tuple[int, int, int]) -> _Side | None:
        if not self.resolved.uses_teacher:
            return None
        if teacher is None:
            raise UserError(f"method {self.resolved.name!r} needs a teacher; give a module")
        side = _side(teacher, size, "teacher")
        if {id(parameter) for parameter in teacher.parameters()} & {id(parameter) for parameter in student.parameters()}:
            raise UserError("teacher and student share weights; give a copy as the teacher")
        return side

    def forward(self, images: Tensor, labels: Tensor | None = None, *, epoch: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of this phase's terms, and every unweighted term by name, detached. All are float32 scalars.

        The networks run under the caller's autocast. The losses never run in half precision.

        Args:
            images: [N, C, H, W] as both networks take them.
            labels: [N] class numbers of any integer type. -1 marks an image without a label, which takes part in the method's terms but
                not in ``task``. Default: no labels and no ``task``.
            epoch: 0-based, for methods with a warm-up or a curriculum. Default: after these.

        Raises:
            UserError: the method learns from labels, and there are none or one is -1; or the labels are no class numbers.
        """
        if self.closed:
            raise RuntimeError("this Distiller was closed; make another")
        self._refuse_other_sizes(images)
        if labels is None and (self.method.uses_labels or self.weights.keys() == {TASK}):
            raise UserError(f"method {self.resolved.name!r} learns from labels in phase {self.phase.name!r}; give them")
        targets = None if labels is None else self._targets(images, labels)
        student_outputs, teacher_outputs = self.student(images), None
        if torch.is_grad_enabled():
            self.student.refuse_cut(student_outputs, embedding=self.method.needs.embedding)
        if self.teacher is not None and any(term != TASK for term in self.weights):
            teacher_outputs = self._ask(self.teacher, images)
        number = None if epoch is None else torch.tensor(epoch, device=images.device)
        with full_precision(images.device):
            batch = Batch(targets.labels if targets else None, epoch=number, targets=targets)
            losses = loss_terms(self.method, student_outputs, teacher_outputs, batch, self.smoothing)
            loss = torch.stack([weight * losses[term] for term, weight in self.weights.items() if term in losses]).sum()
        return loss, {term: value.detach() for term, value in losses.items()}

    def _ask(self, teacher: Network, images: Tensor) -> Outputs:
        """The teacher's outputs in eval mode, even if its owner has changed the mode since. None of its buffers changes."""
        _, original = self._given
        for network in (teacher, original):  # of a network made here the first is a view of the other
            if network is not None and any(module.training for module in network.modules()):
                network.eval()
        with torch.no_grad(), kept(teacher) if teacher.unsettled else contextlib.nullcontext():
            teacher_outputs: Outputs = teacher(images)
        return teacher_outputs

    def _refuse_other_sizes(self, images: Tensor) -> None:
        """Taps and adapters fit one image size alone; logits and embedding go with any.

        Raises:
            UserError: the images have another size.
        """
        size = tuple(images.shape[1:])
        needs = self.method.needs
        same = size == self.size if needs.student | needs.teacher else size[:1] == self.size[:1]
        if images.dim() != 4 or not same:
            expected, actual = ("x".join(map(str, sides)) for sides in (self.size, images.shape))
            raise UserError(f"images {actual}: this Distiller was made for Nx{expected}; make another with images= of that size")

    def _targets(self, images: Tensor, labels: Tensor) -> Targets:
        """What the task is computed with. Labels are checked only on the CPU and outside of torch.compile: that waits for no device."""
        _, labels = checked((images, labels), "the loop")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            other = f"{NO_LABEL} where an image has none"
            refuse_other_labels(labels, self.student.spec.classes, least=NO_LABEL, what="the loop gives", other=other)
            if NO_LABEL in labels:
                users = [cls for cls in methods.parts(self.resolved.name) if cls.uses_labels]
                refuse_users(users, f"label {NO_LABEL}: this image has none", "leave such images out")
        labels = labels.to(images.device, non_blocking=True)
        return Targets(labels, (labels != NO_LABEL).sum().clamp(min=1), None, None)

    def begin_phase(self, number: int) -> None:
        """Begin a phase, 0-based, of a method that trains in several. It needs a new optimiser, of ``trainable_parameters()``.

        Raises:
            UserError: there is no phase of that number.
        """
        phases = self.resolved.phases
        if not 0 <= number < len(phases):
            names = ", ".join(f"{index} ({phase.name})" for index, phase in enumerate(phases))
            raise UserError(f"phase {number}: method {self.resolved.name!r} has the phases {names}")
        self.phase, self.weights = phases[number], self.resolved.counted(phases[number])

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained in this phase: the student's and the adapters', without the frozen ones."""
        return trainable_parameters(self.student, self.method, self.phase)

    def train(self, mode: bool = True) -> Distiller:
        """Set the mode of the student and the method. The teacher stays in eval mode."""
        super().train(mode)
        student, teacher = self._given
        student.train(mode)
        if self.teacher is not None and teacher is not None:
            self.teacher.eval()
            teacher.eval()
        return self

    def close(self) -> None:
        """Remove the hooks. The modules are then as they were given, but the student has learned and the teacher is frozen."""
        self._hooks()
        self.closed = True


class _Side(NamedTuple):
    """What a module offers for images of this size, and how a network with taps is made of it."""

    spec: NetSpec
    data: DataSpec
    build: Callable[[NetSpec, tuple[str, ...]], Network]


def _side(module: nn.Module, size: tuple[int, int, int], role: str) -> _Side:
    if not isinstance(module, nn.Module):
        raise UserError(f"{role}={module!r} is no module; give an nn.Module")
    if uncompiled(module) is not module:
        raise UserError(f"{role} is compiled; give the module itself, and compile the Distiller: torch.compile(Distiller(...))")
    refuse_unready(module, type(module).__name__)
    adapter = module.input_adapter if isinstance(module, Network) else None
    if adapter is not None:
        _, *size = adapter(torch.zeros(1, *size)).shape
    if isinstance(module, Network) and not isinstance(module, Foreign):
        data = DataSpec("images", 0, module.spec.classes, *size)
        return _Side(models.spec(module.spec.name, data), data, _tapped(module))
    body = module.body if isinstance(module, Network) else module
    survey = surveyed(body, type(body).__name__, *size)

    def build(spec: NetSpec, taps: tuple[str, ...]) -> Network:
        net = Foreign(body, spec, taps, survey)
        net.input_adapter = adapter
        return net

    return _Side(survey.spec(type(body).__name__), DataSpec("images", 0, survey.classes, *size), build)


def _tapped(net: Network) -> Callable[[NetSpec, tuple[str, ...]], Network]:
    """Make a network with taps of one of this package's: a view that shares its modules."""

    def build(spec: NetSpec, taps: tuple[str, ...]) -> Network:
        view = copy(net)
        view.spec, view.taps = spec, taps
        return view

    return build


def _resolve_method(method: str, options: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float]) -> ResolvedMethod:
    """The method with every default. Refused if it needs a run of its own."""
    resolved = methods.resolve(method, options, weights)
    if resolved.mutual:
        raise UserError(f"the students of {resolved.name!r} teach each other; {CURE}")
    if resolved.shipped_model("student", "teacher") != "student":
        raise UserError(f"method {resolved.name!r} trains another network, made of registered models; {CURE}, and name two")
    return resolved


def _size(images: Tensor | Sequence[int]) -> tuple[int, int, int]:
    size = images.shape[1:] if isinstance(images, Tensor) else images
    if not isinstance(size, list | tuple) or len(size) != 3 or not all(isinstance(side, int) and side > 0 for side in size):
        shape = getattr(images, "shape", None)
        described = images if shape is None else f"{type(images).__name__} {tuple(shape)}"
        raise UserError(f"images={described}: give a shape (channels, height, width) or a batch of images [N, C, H, W]")
    channels, height, width = size
    return channels, height, width


def _leave_teacher_out(_: nn.Module, state: dict[str, Any], prefix: str, __: object) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}{TEACHER}")]:
        del state[name]


def _keep_teacher(distiller: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Loading is strict about the rest. A state of an earlier version, with a teacher, is loaded without it."""
    _leave_teacher_out(distiller, state, prefix, None)
    if isinstance(distiller, Distiller) and distiller.teacher is not None:
        state |= {f"{prefix}{TEACHER}{name}": value for name, value in distiller.teacher.state_dict().items()}


def _release(*nets: Network | None) -> None:
    for net in nets:
        if net is not None:
            net.release()
