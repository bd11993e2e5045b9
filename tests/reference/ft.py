"""ft: 1/(N M) sum |u_s - u_t|^p on the last stage, u = vec F / ||vec F|| with M entries; paraphraser: the reconstruction's mean square.

F_t: three 3x3 convolutions on the teacher's map; F_s: three on the student's; the reconstruction: three transposed ones on F_t. Each has
a bias and a LeakyReLU of slope 0.1 after it. The larger factor is average-pooled to the smaller.
"""

import math

import numpy as np
from golden.inputs import INPUTS
from helpers.pairs import FIVE, OTHER_STAGES, TWO_STAGES

from flowdistill.methods.ft import ft_loss

from .fitnets import convolved
from .fsp import pool


def layer(features, weight, bias, *, transposed):
    """Sum over c, i, j of w[d, c, i, j] in[c, y + i - 1, x + j - 1]; transposed: of w[c, d, i, j] in[c, y + 1 - i, x + 1 - j]."""
    if transposed:
        weight = np.array([[weight[c, d, ::-1, ::-1] for c in range(weight.shape[0])] for d in range(weight.shape[1])])
    out = convolved(np.pad(features, ((0, 0), (0, 0), (1, 1), (1, 1))), weight)
    for n, d, y, x in np.ndindex(*out.shape):
        value = out[n, d, y, x] + float(bias[d])
        out[n, d, y, x] = value if value > 0 else 0.1 * value
    return out


def layers(features, parameters, name):
    for number in (0, 2, 4):
        weight, bias = parameters[f"{name}.{number}.weight"], parameters[f"{name}.{number}.bias"]
        features = layer(features, weight, bias, transposed=name == "decoder")
    return features


def unit(sample):
    values = [float(v) for v in sample.flat]
    norm = math.sqrt(sum(v * v for v in values))
    return [v / norm for v in values]


def reference(student, teacher, options):
    parameters, theirs = options["parameters"], teacher.maps["stage3"]
    f_s, f_t = layers(student.maps["stage3"], parameters, "translator"), layers(theirs, parameters, "encoder")
    rebuilt = layers(f_t, parameters, "decoder")
    error = sum((float(a) - float(b)) ** 2 for a, b in zip(rebuilt.flat, theirs.flat, strict=True))
    height, width = min(f_s.shape[2], f_t.shape[2]), min(f_s.shape[3], f_t.shape[3])
    f_s, f_t = pool(f_s, height, width, "avg"), pool(f_t, height, width, "avg")
    total = 0.0
    for n in range(len(f_t)):
        for a, b in zip(unit(f_s[n]), unit(f_t[n]), strict=True):
            total += abs(a - b) ** options.get("p", 1) / f_t.size
    return {"ft": total, "paraphraser": error / theirs.size}


DETACHED = 1  # the factor that the student is pulled to
CASES = [{}, {"p": 2}, {"rate": 1.0}, {"stage_epochs": 6, "stage_lr": 0.1}]
BF16 = 2e-3  # the reconstruction is a square, whose errors average out: measured 0.7e-3
WRONG = [
    ({}, FIVE, TWO_STAGES, ["ft", "small are 'stage1', 'stage2', 'stage3'", "shallow 'stage1', 'stage2'"]),
    ({}, FIVE, OTHER_STAGES, ["ft", "'stage3'", "big", "stage4"]),
]
GOLDEN = {
    "ft/paper_p1": lambda: ft_loss(INPUTS["s_st3"], INPUTS["t_st3"]),
    "ft/p2_squared": lambda: ft_loss(INPUTS["s_st3"], INPUTS["t_st3"], 2),
}
OTHER_LOSSES = {"ft/repdistiller": "RepDistiller's: the L1 distance of attention maps made of the factors"}
