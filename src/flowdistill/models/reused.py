"""A student that ships with its teacher's classifier (Chen et al. 2022, SimKD): ``reused(STUDENT,TEACHER,FACTOR)``.

A projector from the student's last map to the teacher's and the teacher's classifier, frozen, take the place of the student's classifier.
If the teacher's last map is smaller than the student's, the student's is average-pooled before the projector.
"""

from __future__ import annotations

import functools
import re

import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import UserError
from ..types import DataSpec
from .base import CAM, FORMS, MODELS, ImageFactory, ImageNetwork, Network, spec

PROJECTED = "projected"
WRITTEN = re.compile(r"reused\((?P<student>[^(),]+),(?P<teacher>[^(),]+),(?P<factor>[1-9]\d*)\)")


def projector(inputs: int, outputs: int, factor: int) -> nn.Sequential:
    """1x1 to outputs / factor channels, 3x3, 1x1 to outputs; each a convolution without bias, batch normalisation and ReLU."""
    inner = outputs // factor
    layers: list[nn.Module] = []
    for before, after, kernel in ((inputs, inner, 1), (inner, inner, 3), (inner, outputs, 1)):
        layers += [nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers)


class Reused(ImageNetwork):
    """A student with a projector and the teacher's classifier.

    Its taps are the student's, and ``projected``: the projector's output, whose mean is the embedding.
    """

    head = "classifier"

    def __init__(self, student: ImageNetwork, inputs: int, shape: tuple[int, int, int], classes: int, factor: int) -> None:
        super().__init__()
        self.student, self.size, self.taps_version = student, shape[1:], student.taps_version
        delattr(student, student.head)
        self.projector = projector(inputs, shape[0], factor)
        self.classifier = nn.Linear(shape[0], classes).requires_grad_(False)
        inner = {tap: f"student.{path}" for tap, path in student.paths.items()}
        self.paths = {**inner, PROJECTED: f"projector.{len(self.projector) - 1}"}

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Images [N, C, H, W] -> every tap, and the projected map."""
        maps, last = self.student.features(images)
        height, width = min(last.shape[2], self.size[0]), min(last.shape[3], self.size[1])
        if last.shape[2] % height == last.shape[3] % width == 0:  # equal to adaptive pooling, and deterministic on a GPU
            last = F.avg_pool2d(last, (last.shape[2] // height, last.shape[3] // width))
        else:
            last = F.adaptive_avg_pool2d(last, (height, width))
        projected = self.projector(last)
        return {**maps, PROJECTED: projected}, projected

    def take_over(self, student: Network, teacher: Network) -> None:
        """Take the student's weights, without its classifier, and the teacher's classifier."""
        kept = {name: value for name, value in student.state_dict().items() if not name.startswith(f"{student.spec.head}.")}
        self.student.load_state_dict(kept)
        self.classifier.load_state_dict(teacher.get_submodule(teacher.spec.head).state_dict())


class ReusedFactory(ImageFactory):
    """Such a student by its whole name.

    Raises:
        UserError: the name is not so written, or a network in it is not registered.
    """

    def __init__(self, name: str) -> None:
        written = WRITTEN.fullmatch(name)
        if written is None:
            raise UserError(
                f"model {name!r}: write reused(STUDENT,TEACHER,FACTOR) with registered models, such as reused(resnet8,resnet20,2)"
            )
        self.name, self.about = name, "a student with a projector and its teacher's classifier (SimKD)"
        self.student, self.teacher, self.factor = written["student"], written["teacher"], int(written["factor"])
        for part in (self.student, self.teacher):
            MODELS[part]
        self._specs = {}

    def network(self, data: DataSpec) -> ImageNetwork:
        """The student with projector and classifier, for such data."""
        student_spec, teacher_spec = spec(self.student, data), spec(self.teacher, data)
        inner = MODELS[self.student]
        assert isinstance(inner, ImageFactory)
        cam = teacher_spec.tap(CAM)
        return Reused(
            inner.network(data), student_spec.embedding, (teacher_spec.embedding, cam.height, cam.width), data.classes, self.factor
        )


FORMS[re.compile(r"reused\(.*")] = functools.lru_cache(ReusedFactory)
