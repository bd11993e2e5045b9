"""ab: 3/1000 sum_i 2^(i-n) 1/N sum of (s + m)^2 where t <= 0 and s > -m, (s - m)^2 where t > 0 and s <= m.

s: a convolution without padding or bias and a batch normalisation on the student's map, brought to the teacher's size.
"""

import torch
from golden.inputs import INPUTS
from helpers.pairs import FIVE, OTHER_STAGES, TWO_STAGES

from flowdistill.methods.ab import ab_loss, boundary_loss

from .fitnets import connected
from .fsp import pool


def reference(student, teacher, options):
    margin = options.get("margin", 1.0)
    total = 0.0
    for number, stage in enumerate(("stage1", "stage2", "stage3")):
        theirs = teacher.maps[stage]
        ours = pool(connected(student.maps[stage], options["parameters"], f"connectors.{number}"), *theirs.shape[2:], "avg")
        for s, t in zip(ours.flat, theirs.flat, strict=True):
            if t <= 0 and s > -margin:
                total += 0.003 * 2.0 ** (number - 2) * float(s + margin) ** 2 / len(theirs)
            if t > 0 and s <= margin:
                total += 0.003 * 2.0 ** (number - 2) * float(s - margin) ** 2 / len(theirs)
    return {"ab": total}


CASES = [{}, {"margin": 2.0}, {"schedule": "joint"}, {"stage_epochs": 5}]
BF16 = 1e-3  # a sum of squares of the order of the margin, whose errors average out: measured 1.0e-4
WRONG = [
    ({}, FIVE, TWO_STAGES, ["ab", "small are 'stage1', 'stage2', 'stage3'", "shallow 'stage1', 'stage2'"]),
    ({}, FIVE, OTHER_STAGES, ["ab", "'stage3'", "big", "stage4"]),
]

OURS, THEIRS = ([INPUTS[f"{who}_st{n}_pre"] for n in (1, 2, 3)] for who in "st")


def mean_over_elements():
    losses = [boundary_loss(s, t, 2.0) / s[0].numel() for s, t in zip(OURS, THEIRS, strict=True)]
    return torch.stack(losses).mean()


GOLDEN = {
    "ab/repdistiller": lambda: ab_loss(OURS, THEIRS),
    "ab/kdzoo": mean_over_elements,
}
