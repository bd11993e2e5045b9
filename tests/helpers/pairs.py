"""Pairs of networks, known by what they declare, that the conformance suite tries every method on."""

from __future__ import annotations

from dataclasses import replace

from flowdistill.types import NetSpec, TapSpec

SIZES = ((8, 8), (8, 8), (4, 4), (2, 2))
UNEVEN_SIZES = ((7, 5), (5, 6), (4, 3), (3, 2))  # between stages and between networks, nothing divides
CHANNELS = (2, 2, 3, 4)


def network(name: str, channels: tuple[int, ...] = CHANNELS, sizes: tuple[tuple[int, int], ...] = SIZES, classes: int = 5) -> NetSpec:
    taps = [TapSpec("stem", channels[0], *sizes[0], "stem")]
    for number, (width, size) in enumerate(zip(channels[1:], sizes[1:], strict=True), 1):
        for tap, module in ((f"stage{number}.first", f"layer{number}.0"), (f"stage{number}", f"layer{number}.1")):
            taps.append(TapSpec(tap, width, *size, module))
    return NetSpec(name, tuple(taps), channels[-1], classes, "fc")


def complete(spec: NetSpec, teacher: NetSpec) -> NetSpec:
    """The network with the rarer taps: the stages' ends before ReLU, with the normalisation that gave them; ``cam``; ``projected``."""
    before = (replace(spec.tap(stage), name=f"{stage}.pre", norm=f"{spec.tap(stage).module}.norm") for stage in spec.stages)
    last = spec.tap(spec.stages[-1])
    goal = teacher.tap(teacher.stages[-1])
    projected = TapSpec("projected", goal.channels, min(last.height, goal.height), min(last.width, goal.width), "projector")
    return replace(spec, taps=(*spec.taps, *before, TapSpec("cam", spec.classes, last.height, last.width, "fc"), projected))


def completed(pairs: dict[str, tuple[NetSpec, NetSpec]]) -> dict[str, tuple[NetSpec, NetSpec]]:
    return {name: (complete(student, teacher), complete(teacher, teacher)) for name, (student, teacher) in pairs.items()}


PAIRS = completed(
    {
        "even": (network("small"), network("big")),
        "uneven": (network("small", sizes=UNEVEN_SIZES), network("big")),
        "wide": (network("small"), network("big", channels=(3, 2, 5, 4))),
        "wide embedding": (network("small"), network("big", channels=(3, 2, 5, 6))),
    }
)
USUAL = ("even", "uneven", "wide")


TINY_SIZES = ((4, 4), (4, 4), (2, 2), (1, 3))  # stage2 divides stage1, stage3 does not divide stage2
TINY = network("small", (2, 2, 2, 2), TINY_SIZES)
TINY_PAIRS = completed(
    {
        "uneven": (TINY, network("big", (2, 2, 2, 2), ((4, 4), (4, 4), (2, 2), (2, 2)))),
        "wide": (TINY, network("big", (3, 2, 3, 2), ((4, 4), (4, 4), (2, 2), (2, 2)))),
        "wide embedding": (TINY, network("big", (3, 2, 3, 3), ((4, 4), (4, 4), (2, 2), (2, 2)))),
    }
)


FIVE, SEVEN = network("small"), network("big", classes=7)
TWO_STAGES = network("shallow", CHANNELS[:3], SIZES[:3])
OTHER_STAGES = replace(FIVE, name="big", taps=tuple(replace(tap, name=tap.name.replace("stage3", "stage4")) for tap in FIVE.taps))
WIDER_STAGE2 = network("big", channels=(2, 2, 5, 4))
ONE_BLOCK = replace(FIVE, name="thin", taps=tuple(replace(tap, module=tap.name[:6]) for tap in FIVE.taps))
