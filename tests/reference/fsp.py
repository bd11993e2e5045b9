"""fsp: G[n, i, j] = 1/(H W) sum_{y,x} first[n, i, y, x] second[n, j, y, x], and the squared distance of G_s from G_t.

sum: 1/N sum over pairs, n, i, j of (G_t - G_s)^2.  mean: 1/P sum over pairs of 1/(N C D) sum over n, i, j of the same.
"""

import numpy as np
from helpers.pairs import FIVE, ONE_BLOCK, OTHER_STAGES, TWO_STAGES, WIDER_STAGE2

PAIRS = {
    "cross": [("stem", "stage1"), ("stage1", "stage2"), ("stage2", "stage3")],
    "section": [("stage1.first", "stage1"), ("stage2.first", "stage2"), ("stage3.first", "stage3")],
}
PRESETS = {  # pairing, pool, reduction
    "ours": ("cross", "max", "mean"),
    "log": ("cross", "avg", "mean"),
    "kd-zoo": ("cross", "avg", "mean"),
    "paper": ("section", "max", "sum"),
}


def pool(x, height, width, how):
    """Bin i of h covers the rows floor(i H / h) to ceil((i + 1) H / h) - 1, and so for columns."""
    batch, channels, rows, columns = x.shape
    pooled = np.zeros((batch, channels, height, width))
    for n in range(batch):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    top, bottom = i * rows // height, -(-(i + 1) * rows // height)
                    left, right = j * columns // width, -(-(j + 1) * columns // width)
                    values = [float(x[n, c, y, z]) for y in range(top, bottom) for z in range(left, right)]
                    pooled[n, c, i, j] = max(values) if how == "max" else sum(values) / len(values)
    return pooled


def flow(first, second, how):
    height, width = min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3])
    first, second = pool(first, height, width, how), pool(second, height, width, how)
    matrix = np.zeros((len(first), first.shape[1], second.shape[1]))
    for n, i, j in np.ndindex(*matrix.shape):
        total = 0.0
        for y in range(height):
            for x in range(width):
                total += float(first[n, i, y, x]) * float(second[n, j, y, x])
        matrix[n, i, j] = total / (height * width)
    return matrix


def adapted(features, weight):
    """A 1x1 convolution without bias: out[d] = sum_c weight[d, c] in[c]."""
    if weight is None:
        return features
    out = np.zeros((features.shape[0], weight.shape[0], *features.shape[2:]))
    for n, d, y, x in np.ndindex(*out.shape):
        out[n, d, y, x] = sum(float(weight[d, c, 0, 0]) * float(features[n, c, y, x]) for c in range(features.shape[1]))
    return out


def reference(student, teacher, options):
    pairing, how, reduction = PRESETS[options.get("preset", "ours")]
    pairs = PAIRS[options.get("pairing", pairing)]
    how, reduction = options.get("pool", how), options.get("reduction", reduction)
    parameters = options["parameters"]
    total = 0.0
    for pair in pairs:
        ours = [adapted(student.maps[tap], parameters.get(f"adapters.{tap.replace('.', '_')}.weight")) for tap in pair]
        g_s, g_t = flow(*ours, how), flow(teacher.maps[pair[0]], teacher.maps[pair[1]], how)
        square = 0.0
        for n, i, j in np.ndindex(*g_t.shape):
            square += (float(g_t[n, i, j]) - float(g_s[n, i, j])) ** 2
        batch, rows, columns = g_t.shape
        total += square / batch if reduction == "sum" else square / (batch * rows * columns * len(pairs))
    return {"fsp": total}


CASES = [
    {},
    {"preset": "log"},
    {"preset": "paper"},
    {"pairing": "section"},
    {"reduction": "sum"},
    {"pool": "avg", "reduction": "sum"},
    {"adapter": "conv1x1"},
    {"adapter": "conv1x1", "pairing": "section", "reduction": "sum"},
]
BF16 = 5e-3  # a square of the difference of two averages over the image, where errors average out: measured 1.2e-3
WRONG = [
    (
        {},
        FIVE,
        TWO_STAGES,
        ["fsp", "small are 'stage1', 'stage2', 'stage3'", "shallow 'stage1', 'stage2'", "choose networks with the same stages"],
    ),
    ({}, FIVE, OTHER_STAGES, ["'stage3'", "big", "stage4"]),
    ({}, FIVE, WIDER_STAGE2, ["fsp", "'stage2'", "3x4x4 in small", "5x4x4 in big", "set options.fsp.adapter=conv1x1"]),
    ({"pairing": "section"}, ONE_BLOCK, FIVE, ["thin", "'stage1.first'", "'stage1'", "2x8x8", "set options.fsp.pairing=cross"]),
    ({"pairing": "section"}, FIVE, ONE_BLOCK, ["thin", "'stage1.first'", "'stage1'", "2x8x8", "set options.fsp.pairing=cross"]),
]


def pairs(options):
    """It compares channel by channel: a wider teacher is nothing for it without an adapter."""
    return ["even", "uneven"] if "adapter" not in options else ["even", "uneven", "wide"]
