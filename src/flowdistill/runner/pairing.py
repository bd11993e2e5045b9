"""Which stage of the student learns from which of the teacher, if their stages are not the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..checks import UserError
from ..models.joined import joined_spec, student_of
from ..types import DataSpec, NetSpec, TapSpec

MIN_PAIRS = 2  # pairs of equal stride that are enough to pair by stride


class Pairing(NamedTuple):
    """Student and teacher whose stages have the same names.

    Attributes:
        why: how the stages were paired; empty if they are the networks' own.
    """

    student: NetSpec
    teacher: NetSpec
    why: str = ""


def pair(student: NetSpec, teacher: NetSpec, student_data: DataSpec, teacher_data: DataSpec, *, named: bool = False) -> Pairing:
    """Pair the stages: in order if both have as many; else those of equal stride; else the last ones, counted from the classifier.

    A stride is the height of a network's image divided by the map's. Stages without a partner are left out, and the others numbered anew.
    If the user ``named`` taps, they are taken as they are.

    Raises:
        UserError: the user named taps and the stages of the two are not the same, or a network's stages grow.
    """
    for net in (student, teacher):
        _refuse_growing(net)
    student_stages, teacher_stages = student.stages, teacher.stages
    if student_stages == teacher_stages or not student_stages or not teacher_stages:
        return Pairing(student, teacher)
    if named:
        raise UserError(
            f"the stages of {student.name} ({_listed(student)}) and of {teacher.name} ({_listed(teacher)}) are not named alike; name "
            f"those that belong together stage1, stage2, ... in both tables"
        )
    student_at, teacher_at = _by_stride(student, student_data), _by_stride(teacher, teacher_data)
    common = [stride for stride in student_at if stride in teacher_at]
    if len(common) >= min(MIN_PAIRS, len(student_stages), len(teacher_stages)):
        return _renamed(student, teacher, [(student_at[stride], teacher_at[stride]) for stride in common], "by stride")
    count = min(len(student_stages), len(teacher_stages))
    return _renamed(student, teacher, list(zip(student_stages[-count:], teacher_stages[-count:], strict=True)), "the last ones, in order")


def with_several(pairs: Sequence[Pairing]) -> Pairing:
    """A student and several teachers, from the student's pairing with each."""
    told = [f"{pairing.why} (teacher {number})" for number, pairing in enumerate(pairs, 1) if pairing.why]
    return Pairing(student_of([pairing.student for pairing in pairs]), joined_spec([pairing.teacher for pairing in pairs]), ", ".join(told))


def _by_stride(net: NetSpec, data: DataSpec) -> dict[int, str]:
    return {round(data.height / net.tap(stage).height): stage for stage in net.stages}


def _refuse_growing(net: NetSpec) -> None:
    for stage, later in zip(net.stages, net.stages[1:], strict=False):
        if net.tap(stage).height < net.tap(later).height:
            raise UserError(
                f"{net.name}: {later} ({_described(net.tap(later))}) is larger than {stage} ({_described(net.tap(stage))}) before it; "
                f"number the stages from the image to the classifier. Its taps: {_listed(net)}"
            )


def _renamed(student: NetSpec, teacher: NetSpec, pairs: list[tuple[str, str]], why: str) -> Pairing:
    names = [{pair[side]: f"stage{number}" for number, pair in enumerate(pairs, 1)} for side in (0, 1)]
    return Pairing(_under(student, names[0]), _under(teacher, names[1]), why)


def _under(net: NetSpec, names: Mapping[str, str]) -> NetSpec:
    """The network with its stages under other names, without those that have none. What belongs to a stage goes with it."""

    def taps() -> Iterator[TapSpec]:
        for tap in net.taps:
            stage, dot, part = tap.name.partition(".")
            if not re.fullmatch(r"stage\d+", stage):
                yield tap
            elif stage in names:
                yield replace(tap, name=f"{names[stage]}{dot}{part}", source=tap.own)

    return replace(net, taps=tuple(taps()))


def compared(pairing: Pairing, student_taps: frozenset[str], teacher_taps: frozenset[str]) -> list[str]:
    """A heading, and a line for each tap that a method compares."""
    student, teacher = pairing.student, pairing.teacher
    lines = [f"taps of {student.name} <- {teacher.name}" + (f", stages paired {pairing.why}" if pairing.why else "")]
    for name in sorted(student_taps | teacher_taps):
        student_tap = student.tap(name) if name in student_taps else None
        teacher_tap = teacher.tap(name) if name in teacher_taps else None
        lines.append(f"  {name}: {_described(student_tap)} <- {_described(teacher_tap)}{_differing(student_tap, teacher_tap)}")
    return lines


def _differing(student_tap: TapSpec | None, teacher_tap: TapSpec | None) -> str:
    if student_tap is None or teacher_tap is None:
        return ""
    channels = f"; channels {student_tap.channels} <- {teacher_tap.channels}" if student_tap.channels != teacher_tap.channels else ""
    student_size, teacher_size = (f"{tap.height}x{tap.width}" for tap in (student_tap, teacher_tap))
    return channels + (f"; sizes {student_size} <- {teacher_size}" if student_size != teacher_size else "")


def _described(tap: TapSpec | None) -> str:
    return "-" if tap is None else f"{tap.module or tap.own} {tap.shape}"


def _listed(net: NetSpec) -> str:
    return ", ".join(f"{tap.name} {_described(tap)}" for tap in net.taps) or "none"
