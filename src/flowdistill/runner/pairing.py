"""Which stage of the student learns from which of the teacher, where their stages are not the same."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from ..checks import UserError
from ..types import DataSpec, NetSpec, TapSpec

MIN_PAIRS = 2  # pairs of one stride, before their number counts for more than their order


class Pairing(NamedTuple):
    """Student and teacher whose stages have the same names.

    Attributes:
        why: how the stages were paired; empty where they are the networks' own.
    """

    student: NetSpec
    teacher: NetSpec
    why: str = ""


def pair(student: NetSpec, teacher: NetSpec, student_data: DataSpec, teacher_data: DataSpec, *, named: bool = False) -> Pairing:
    """Pair the stages: as many of each in order; else those of equal stride; else, counted from the classifier, the last ones.

    A stride is the image's height by the map's, each network's own. Stages of no pair are left out, and the others numbered anew. Where
    the user ``named`` taps, they are taken as they are.

    Raises:
        UserError: the named stages of the two are not the same, or a network's stages grow.
    """
    for net in (student, teacher):
        _refuse_growing(net)
    ours, theirs = student.stages, teacher.stages
    if ours == theirs or not ours or not theirs:
        return Pairing(student, teacher)
    if named:
        raise UserError(
            f"the stages of {student.name} ({_listed(student)}) and of {teacher.name} ({_listed(teacher)}) are not named alike; name "
            f"those that belong together stage1, stage2, ... in both tables"
        )
    at, their_at = _by_stride(student, student_data), _by_stride(teacher, teacher_data)
    common = [stride for stride in at if stride in their_at]
    if len(common) >= min(MIN_PAIRS, len(ours), len(theirs)):
        return _renamed(student, teacher, [(at[stride], their_at[stride]) for stride in common], "by stride")
    count = min(len(ours), len(theirs))
    return _renamed(student, teacher, list(zip(ours[-count:], theirs[-count:], strict=True)), "the last ones, in order")


def _by_stride(net: NetSpec, data: DataSpec) -> dict[int, str]:
    return {round(data.height / net.tap(stage).height): stage for stage in net.stages}


def _refuse_growing(net: NetSpec) -> None:
    for one, other in zip(net.stages, net.stages[1:], strict=False):
        if net.tap(one).height < net.tap(other).height:
            raise UserError(
                f"{net.name}: {other} ({_place(net.tap(other))}) is larger than {one} ({_place(net.tap(one))}) before it; number "
                f"the stages from the image to the classifier. Its taps: {_listed(net)}"
            )


def _renamed(student: NetSpec, teacher: NetSpec, pairs: list[tuple[str, str]], why: str) -> Pairing:
    names = [{pair[side]: f"stage{number}" for number, pair in enumerate(pairs, 1)} for side in (0, 1)]
    return Pairing(_under(student, names[0]), _under(teacher, names[1]), why)


def _under(net: NetSpec, names: Mapping[str, str]) -> NetSpec:
    """The network with its stages under other names, and without those that have none; what belongs to a stage goes with it."""

    def taps() -> Iterator[TapSpec]:
        for tap in net.taps:
            stage, dot, part = tap.name.partition(".")
            if not re.fullmatch(r"stage\d+", stage):
                yield tap
            elif stage in names:
                yield replace(tap, name=f"{names[stage]}{dot}{part}", source=tap.own)

    return replace(net, taps=tuple(taps()))


def compared(pairing: Pairing, student_taps: frozenset[str], teacher_taps: frozenset[str]) -> list[str]:
    """A line for each tap that a method compares, and one before them."""
    student, teacher = pairing.student, pairing.teacher
    lines = [f"taps of {student.name} <- {teacher.name}" + (f", stages paired {pairing.why}" if pairing.why else "")]
    for name in sorted(student_taps | teacher_taps):
        ours, theirs = (net.tap(name) if name in taps else None for net, taps in ((student, student_taps), (teacher, teacher_taps)))
        lines.append(f"  {name}: {_place(ours)} <- {_place(theirs)}{_differing(ours, theirs)}")
    return lines


def _differing(ours: TapSpec | None, theirs: TapSpec | None) -> str:
    if ours is None or theirs is None:
        return ""
    channels = f"; channels {ours.channels} <- {theirs.channels}" if ours.channels != theirs.channels else ""
    one, other = (f"{tap.height}x{tap.width}" for tap in (ours, theirs))
    return channels + (f"; sizes {one} <- {other}" if one != other else "")


def _place(tap: TapSpec | None) -> str:
    return "-" if tap is None else f"{tap.module or tap.own} {tap.shape}"


def _listed(net: NetSpec) -> str:
    return ", ".join(f"{tap.name} {_place(tap)}" for tap in net.taps) or "none"
