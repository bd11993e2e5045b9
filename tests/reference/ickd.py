"""ickd: 1/(N C) sum_n ||G_s - G_t||_F^2 on the last stage, G[i, j] = <f_i, f_j> with each row divided by its norm.

The student's map goes through a 1x1 convolution without bias and a batch normalisation.
"""

import math

import numpy as np
from golden.inputs import INPUTS
from helpers.pairs import FIVE, OTHER_STAGES, TWO_STAGES

from flowdistill.methods.ickd import ickd_loss

from .fsp import adapted


def batch_normalised(features, weight, bias):
    """By the mean and the (biased) variance of the batch, as in training; 1e-5 is added to the variance."""
    out = np.zeros(features.shape)
    for c in range(features.shape[1]):
        values = [float(v) for v in features[:, c].flat]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        for n, y, x in np.ndindex(features.shape[0], *features.shape[2:]):
            out[n, c, y, x] = (float(features[n, c, y, x]) - mean) / math.sqrt(variance + 1e-5) * float(weight[c]) + float(bias[c])
    return out


def correlation(features):
    channels = [[float(v) for v in plane.flat] for plane in features]
    rows = []
    for first in channels:
        row = [sum(a * b for a, b in zip(first, second, strict=True)) for second in channels]
        norm = math.sqrt(sum(v * v for v in row))
        rows.append([v / norm if norm > 0 else 0.0 for v in row])
    return rows


def reference(student, teacher, options):
    parameters = options["parameters"]
    ours, theirs = student.maps["stage3"], teacher.maps["stage3"]
    ours = adapted(ours, parameters["convolution.weight"])
    ours = batch_normalised(ours, parameters["normalisation.weight"], parameters["normalisation.bias"])
    batch, channels = theirs.shape[:2]
    total = 0.0
    for n in range(batch):
        g_s, g_t = correlation(ours[n]), correlation(theirs[n])
        for i in range(channels):
            for j in range(channels):
                total += (g_s[i][j] - g_t[i][j]) ** 2
    return {"ickd": total / (batch * channels)}


CASES = [{}]
BF16 = 5e-3  # the embedding sums over few channels here, then a square of differences: measured 1.3e-3
WRONG = [
    ({}, FIVE, TWO_STAGES, ["ickd", "small are 'stage1', 'stage2', 'stage3'", "shallow 'stage1', 'stage2'"]),
    ({}, FIVE, OTHER_STAGES, ["ickd", "'stage3'", "big", "stage4"]),
]
GOLDEN = {
    "ickd/cifar_code": lambda: ickd_loss(INPUTS["s_st3"], INPUTS["t_st3"]),
    "ickd/imagenet_code": lambda: ickd_loss(INPUTS["s_st3"], INPUTS["t_st3"]) / len(INPUTS["s_st3"]),  # divided by the batch once more
}
