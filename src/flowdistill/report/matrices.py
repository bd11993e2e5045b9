"""A picture of FSP matrices: those of a teacher, of its student, and of the same network trained without a teacher."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import UserError
from ..config import DataConfig, parse_as
from ..data.normalisation import Normalisation
from ..data.sources import load
from ..ledger import Ledger, Run
from ..methods.fsp import FSP, fsp_matrix, match_sizes
from ..runner.measured_on import measured_on
from ..runner.plan import recorded
from ..runner.references import resolve
from ..training.weights import write_whole

if TYPE_CHECKING:
    import altair

IMAGE = 0  # of the test set
SIDE = 256  # pixels of a matrix's picture before scaling: whole ones for 16, 32 and 64 channels


def draw(path: Path, student: Run, alone: Run, ledger: Ledger) -> str:
    """Write the picture, a PNG, and say what it shows.

    Args:
        path: of the file.
        student: a finished FSP run, whose options decide the pairs of maps and the pooling.
        alone: a finished run of the same model, data and seed without a teacher.
        ledger: where both lie, and the student's teacher.
    """
    teacher = ledger.run(student.teacher_run or 0)
    data = load(parse_as(DataConfig, student.config["data"]))
    specs = {"student": resolve(str(student.no), ledger).spec(data.spec), "teacher": resolve(str(teacher.no), ledger).spec(data.spec)}
    fsp = FSP(student.config["options"]["fsp"], **specs)
    normalisation = Normalisation.measured(data.x_train, data.y_train)
    normalise = normalisation.on(torch.device("cpu"))
    image = normalise(torch.from_numpy(data.x_test[IMAGE : IMAGE + 1]))
    matrices: dict[str, list[Tensor]] = {}
    for name, run in {"teacher": teacher, "FSP student": student, "trained alone": alone}.items():
        net = resolve(str(run.no), ledger).build(data.spec, taps=tuple(sorted(fsp.needs.student)), given=normalisation).eval()
        matrices[f"{name}, run {run.no}"] = _matrices(net(image).maps, fsp)
    write_whole(path, _picture(matrices, fsp.pairs))
    return (
        f"Test image {IMAGE} of {data.name} (label {data.y_test[IMAGE]}), networks in eval mode, float32; one colour scale a row. "
        f"Trained alone: the baseline that began from the student's own initial weights (seed {alone.seed})."
    )


def of_run(run: Run, ledger: Ledger, device: torch.device) -> bytes | None:
    """The picture of a finished run's matrices beside its teacher's, on the first test image, as a PNG. None if its method has no FSP.

    Raises:
        UserError: the run can't be made again as it began; or an adapter made the student's channels as many as the teacher's, and
            adapters are not kept.
    """
    if FSP.name not in run.method.split("+"):
        return None
    (job,) = recorded([run], ledger, device)
    method = job.method()
    fsp = next(part for part in method.modules() if isinstance(part, FSP))
    assert job.teacher is not None
    assert job.pairing is not None
    if len(fsp.adapters):
        raise UserError("options.fsp.adapter trained adapters, which are not kept")
    cpu = torch.device("cpu")
    shown = measured_on(job.data, run.split, cpu)
    taps, given = tuple(sorted(fsp.needs.student)), shown.normalisation
    student, teachers = ((spec.parts or (spec,)) for spec in (job.student_taps, job.pairing.teacher))
    nets = {
        f"teacher {one.model}, {one.origin}" if len(teachers) > 1 else f"teacher {one.model}": one.build(
            job.data.spec, taps=taps, spec=spec, given=given
        )
        for one, spec in zip(job.teacher.each, teachers, strict=True)
    }
    nets |= {f"student, run {run.no}": resolve(str(run.no), ledger).build(job.data.spec, taps=taps, spec=student[0], given=given)}
    image = shown.some(1)
    return _picture({name: _matrices(net.eval()(image).maps, fsp) for name, net in nets.items()}, fsp.pairs)


@torch.no_grad()
def _matrices(maps: Mapping[str, Tensor], fsp: FSP) -> list[Tensor]:
    """[C, D] for each pair, of the first image."""
    return [fsp_matrix(*match_sizes(maps[first], maps[second], fsp.options.pool))[0] for first, second in fsp.pairs]


def _row(pair: tuple[str, str], matrices: Sequence[Tensor], names: Sequence[str]) -> altair.HConcatChart:
    """One pair's matrices of all networks, on one colour scale; the first is the teacher's."""
    import altair

    first, second = pair
    highest = max(float(matrix.max()) for matrix in matrices)
    teacher = matrices[0]
    notes = [f"norm {float(teacher.norm()):.3g}"]
    notes += [f"distance to teacher {float((matrix - teacher).norm() / teacher.norm()):.2f} of its norm" for matrix in matrices[1:]]
    panels = [
        _panel(matrix, pair, highest).properties(title=altair.TitleParams(name, subtitle=note))
        for matrix, name, note in zip(matrices, names, notes, strict=True)
    ]
    title = altair.TitleParams(f"{first} to {second}", anchor="start", fontSize=16)
    return altair.hconcat(*panels, spacing=30, title=title)


def _panel(matrix: Tensor, pair: tuple[str, str], highest: float) -> altair.Chart:
    import altair

    rows, columns = matrix.shape
    cells = [{"i": i, "j": j, "G": float(matrix[i, j])} for i in range(rows) for j in range(columns)]
    across = altair.Axis(labelAngle=0, values=list(range(0, columns, 8)))
    down = altair.Axis(minExtent=28, values=list(range(0, rows, 8)))  # the same for all, so that the matrices stand in line
    scale = altair.Scale(type="sqrt", scheme="viridis", domain=[0, highest])  # a few entries are far above the rest
    chart: altair.Chart = (
        altair.Chart(altair.InlineData(values=cells), width=SIDE, height=SIDE)
        .mark_rect()
        .encode(
            x=altair.X("j:O", title=f"channel of {pair[1]}", axis=across),
            y=altair.Y("i:O", title=f"channel of {pair[0]}", axis=down),
            color=altair.Color("G:Q", title="G (square-root scale)", scale=scale),
        )
    )
    return chart


def _picture(matrices: Mapping[str, Sequence[Tensor]], pairs: Sequence[tuple[str, str]]) -> bytes:
    """A PNG with a row for each pair. ``matrices`` has those of each network, the teacher's first."""
    import altair

    rows = [_row(pair, [of_net[index] for of_net in matrices.values()], list(matrices)) for index, pair in enumerate(pairs)]
    buffer = io.BytesIO()
    chart = altair.vconcat(*rows, spacing=40).resolve_scale(color="independent")
    chart.configure_view(stroke=None).save(buffer, format="png", scale_factor=2)
    return buffer.getvalue()
