"""cat_kd: 1/(N K r^2) sum (A_s - A_t)^2, A a class activation map averaged to r x r and, normalised, divided by its L2 norm."""

import math
from dataclasses import replace

from golden.inputs import INPUTS
from helpers.pairs import FIVE, SEVEN, complete

from flowdistill.methods.cat_kd import cat_loss

from .fsp import pool


def attention(plane, normalise):
    values = [float(v) for v in plane.flat]
    norm = math.sqrt(sum(v * v for v in values)) if normalise else 1.0
    return [v / norm for v in values]


def reference(student, teacher, options):
    r, normalise = options.get("r", 2), options.get("normalise", True)
    ours, theirs = (pool(side.maps["cam"], r, r, "avg") for side in (student, teacher))
    total = 0.0
    for n in range(len(theirs)):
        for k in range(theirs.shape[1]):
            for a, b in zip(attention(ours[n, k], normalise), attention(theirs[n, k], normalise), strict=True):
                total += (a - b) ** 2
    return {"cat_kd": total / theirs.size}


CASES = [{}, {"normalise": False}, {"r": 3}, {"r": 3, "normalise": False}]
BF16 = 2e-3  # a square of the difference of two averages: measured 1.4e-4, up to 7.5e-4 over 20 draws
WRONG = [
    ({}, FIVE, SEVEN, ["cat_kd", "small has 5 classes", "big 7", "train both on the same classes"]),
    ({}, FIVE, complete(FIVE, FIVE), ["cat_kd: small has no tap 'cam'", "choose a network that has, or a method on logits such as kd"]),
    ({}, complete(FIVE, FIVE), replace(FIVE, name="big"), ["cat_kd: big has no tap 'cam'"]),
]
GOLDEN = {
    "cat_kd/r2_norm": lambda: cat_loss(INPUTS["s_cam"], INPUTS["t_cam"]),
    "cat_kd/r2_raw": lambda: cat_loss(INPUTS["s_cam"], INPUTS["t_cam"], normalise=False),
}
