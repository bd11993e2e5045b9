"""at: q = v / ||v||, v[y, x] = 1/C sum_c f[c, y, x]^2, and the distance of q_s from q_t summed over the stages.

code: 1/(N H W) sum (q_s - q_t)^2.  paper: 1/N sum_n ||q_s - q_t||.  The larger feature map is average-pooled to the smaller.
"""

import math

from helpers.pairs import FIVE, OTHER_STAGES, TWO_STAGES

from .fsp import pool


def attention(features):
    channels, height, width = features.shape
    energy = []
    for y in range(height):
        for x in range(width):
            energy.append(sum(float(features[c, y, x]) ** 2 for c in range(channels)) / channels)
    norm = max(math.sqrt(sum(v * v for v in energy)), 1e-12)
    return [v / norm for v in energy]


def reference(student, teacher, options):
    total = 0.0
    for stage in ("stage1", "stage2", "stage3"):
        ours, theirs = student.maps[stage], teacher.maps[stage]
        height, width = min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3])
        ours, theirs = pool(ours, height, width, "avg"), pool(theirs, height, width, "avg")
        for n in range(len(ours)):
            q_s, q_t = attention(ours[n]), attention(theirs[n])
            square = sum((a - b) ** 2 for a, b in zip(q_s, q_t, strict=True))
            if options.get("mode", "code") == "code":
                total += square / (len(ours) * height * width)
            else:
                total += math.sqrt(square) / len(ours)
    return {"at": total}


CASES = [{}, {"mode": "paper"}]
BF16 = 5e-3  # a square of the difference of two unit vectors, whose errors average over the channels: measured 0.9e-3
WRONG = [
    (
        {},
        FIVE,
        TWO_STAGES,
        ["at", "small are 'stage1', 'stage2', 'stage3'", "shallow 'stage1', 'stage2'", "choose networks with the same stages"],
    ),
    ({}, FIVE, OTHER_STAGES, ["'stage3'", "big", "stage4"]),
]
