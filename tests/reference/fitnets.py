"""fitnets: 1/(N C H W) sum (r - t)^2 on the middle stage, the teacher's map average-pooled where it is larger.

r: where the shapes differ, a convolution without padding or bias, batch normalisation and ReLU on the student's map; else that map.
"""

import numpy as np
from golden.inputs import INPUTS
from helpers.pairs import FIVE, OTHER_STAGES, TWO_STAGES

from flowdistill.methods.fitnets import hint_loss

from .fsp import pool
from .ickd import batch_normalised


def convolved(features, weight):
    """out[d, y, x] = sum over c, i, j of weight[d, c, i, j] in[c, y + i, x + j], where the kernel lies wholly inside."""
    batch, channels, height, width = features.shape
    outputs, _, rows, columns = weight.shape
    out = np.zeros((batch, outputs, height - rows + 1, width - columns + 1))
    for n, d, y, x in np.ndindex(*out.shape):
        for c, i, j in np.ndindex(channels, rows, columns):
            out[n, d, y, x] += float(weight[d, c, i, j]) * float(features[n, c, y + i, x + j])
    return out


def connected(features, parameters, name):
    """A convolution and a batch normalisation."""
    out = convolved(features, parameters[f"{name}.0.weight"])
    return batch_normalised(out, parameters[f"{name}.1.weight"], parameters[f"{name}.1.bias"])


def reference(student, teacher, options):
    ours, theirs = student.maps["stage2"], teacher.maps["stage2"]
    if options["parameters"]:
        ours = connected(ours, options["parameters"], "regressor")
        ours = np.where(ours > 0, ours, 0.0)
    theirs = pool(theirs, *ours.shape[2:], "avg")
    total = 0.0
    for place in np.ndindex(*theirs.shape):
        total += (float(ours[place]) - float(theirs[place])) ** 2
    return {"fitnets": total / theirs.size}


CASES = [{}, {"schedule": "two-stage", "stage_epochs": 5}]
BF16 = 2e-3  # a square, so twice the error of r - t, which averages out: measured 3.2e-4
WRONG = [
    ({}, FIVE, TWO_STAGES, ["fitnets", "small are 'stage1', 'stage2', 'stage3'", "shallow 'stage1', 'stage2'"]),
    ({}, FIVE, OTHER_STAGES, ["fitnets", "'stage3'", "big", "stage4"]),
]
GOLDEN = {
    "fitnets/mean": lambda: hint_loss(INPUTS["s_st2"], INPUTS["t_st2"]),
    "fitnets/paper": lambda: hint_loss(INPUTS["s_st2"], INPUTS["t_st2"]) * INPUTS["t_st2"][0].numel() / 2,
}
