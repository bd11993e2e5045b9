"""What a run's numbers depend on, as one hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any, Protocol

from .. import models
from ..config import RunConfig
from ..data.dataset import ImageData
from ..methods import Needs
from ..models.foreign import is_foreign
from ..models.input_adapter import InputSpec
from ..training.linear_probe import VERSION as PROBE_VERSION
from ..types import NetSpec
from .pairing import Pairing
from .references import NetworkRef
from .several import roles


class Planned(Protocol):
    """What of a job its fingerprint covers."""

    @property
    def config(self) -> RunConfig:
        """With every default filled in."""

    @property
    def data(self) -> ImageData:
        """The images, with their hash."""

    @property
    def student(self) -> NetworkRef:
        """As it begins."""

    @property
    def teacher(self) -> NetworkRef | None:
        """None without one."""

    @property
    def student_taps(self) -> NetSpec:
        """What is trained, its stages named as those of the teacher that they learn from."""

    @property
    def pairing(self) -> Pairing | None:
        """Student and teacher, their stages named alike."""

    @property
    def ranks(self) -> int:
        """How many processes share its batches out, if its numbers depend on that; else 1."""

    @property
    def needs_and_versions(self) -> tuple[Needs, Mapping[str, int]]:
        """What its method needs, and the version of each of the method's parts."""


def fingerprint(job: Planned, made_of: Mapping[str, list[Any]]) -> str:
    """What a run's numbers depend on, without the seed.

    Args:
        made_of: by role, what a network's name and weights do not say of it.
    """
    needs, versions = job.needs_and_versions
    config, student, teacher, unlabelled = job.config, job.student, job.teacher, job.data.unlabelled
    covered: dict[str, Any] = {
        "student": _covered(student, made_of["student"]),
        "teacher": _covered(teacher, [part for role in roles(len(teacher.each)) for part in made_of[role]]) if teacher else None,
        "data": [job.data.hash, config.data.pad, config.data.flip, *config.data.model_dump(include={"crop", "randaugment"}).values()],
        "method": versions,
        "options": config.options,
        "weights": config.weights,
        "train": config.train.model_dump(exclude={"batch_norm"}),  # alone it changes no number; ``ranks`` says where it does
        "split": config.split,
    }
    if student.init:
        covered["init_from"] = student.init
    if teacher and any(sees := [_other_images(one, job.data.hash, config.split) for one in teacher.each]):
        covered["sees"] = sees if len(sees) > 1 else sees[0]
    if config.probe:
        covered["probe"] = PROBE_VERSION
    if config.inputs:
        covered["inputs"] = {role: images.model_dump() for role, images in config.inputs.items()}
    if taps := _compared(job, needs):
        covered["taps"] = taps
    if newer := _versions_of_taps(job, needs):
        covered["versions of taps"] = newer
    if config.peer is not None:
        covered["peer"] = [models.canonical(config.peer), "", *made_of["peer"], config.side]
    if unlabelled is not None:
        covered["unlabelled"] = unlabelled.hash
    if list(job.data.class_names) != [str(number) for number in range(len(job.data.class_names))]:
        covered["classes"] = job.data.class_names
    if job.ranks > 1:
        covered["ranks"] = job.ranks
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _other_images(teacher: NetworkRef, data_hash: str, split: str) -> list[Any]:
    """The images that the teacher was made for, if they need not be like those trained on; else empty."""
    same = teacher.trained_on is not None and (teacher.trained_on.data_hash, teacher.trained_on.split) == (data_hash, split)
    if same or teacher.input_spec == InputSpec():
        return []
    *images, interpolation = astuple(teacher.input_spec)
    return images if interpolation is None else [*images, interpolation]


def _compared(job: Planned, needs: Needs) -> list[list[str]]:
    """The taps that are compared; empty if all are this package's own under their own names."""
    sides = [(job.student_taps, needs.student)]
    if job.pairing:
        sides.append((job.pairing.teacher, needs.teacher))
    taps = [(net, net.tap(name)) for net, names in sides for name in sorted(names)]
    if not any(tap.source or is_foreign(net.name) for net, tap in taps):
        return []
    return [[net.name, tap.name, tap.module, tap.own] for net, tap in taps]


def _versions_of_taps(job: Planned, needs: Needs) -> dict[str, int]:
    """By role, the version of the taps that are compared, if their names gave other maps before."""
    sides = {"student": (job.student_taps, needs.student)} | ({"teacher": (job.pairing.teacher, needs.teacher)} if job.pairing else {})
    return {role: net.version for role, (net, names) in sides.items() if names and net.version > 1}


def _covered(network: NetworkRef, made_of: Sequence[Any]) -> list[Any]:
    return [network.model, network.fingerprint, *made_of]
