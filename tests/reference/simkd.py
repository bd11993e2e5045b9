"""simkd: 1/(N C H W) sum (p - t)^2 on the projected map, of two sizes the larger average-pooled."""

from dataclasses import replace

import numpy as np
from golden.inputs import INPUTS
from helpers.pairs import FIVE, PAIRS, SEVEN, network

from flowdistill.methods.simkd import projection_loss

from .fsp import pool


def reference(student, teacher, options):
    ours, theirs = student.maps["projected"], teacher.maps["stage3"]
    size = [min(ours.shape[axis], theirs.shape[axis]) for axis in (2, 3)]
    ours, theirs = pool(ours, *size, "avg"), pool(theirs, *size, "avg")
    total = 0.0
    for place in np.ndindex(*theirs.shape):
        total += (float(ours[place]) - float(theirs[place])) ** 2
    return {"simkd": total / theirs.size}


CASES = [{}, {"factor": 4}]
BF16 = 2e-3  # a square, so twice the error of p - t, which averages out
EVEN = PAIRS["even"]
WRONG = [
    ({}, FIVE, FIVE, ["small has no tap 'projected'"]),
    ({}, EVEN[0], SEVEN, ["simkd", "small has 5 classes", "big 7", "train both on the same classes"]),
    ({}, EVEN[0], replace(FIVE, embedding=9), ["simkd", "small (9 wide) is not the mean of a stage", "choose a teacher whose last stage"]),
    (
        {},
        EVEN[0],
        network("big", channels=(2, 2, 3, 6)),
        ["tap 'projected' of small is 4x2x2, 'stage3' of big 6x2x2", "choose the student"],
    ),
]
GOLDEN = {"simkd/feature": lambda: projection_loss(INPUTS["s_st3"], INPUTS["t_st3"])}
