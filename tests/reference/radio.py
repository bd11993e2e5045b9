"""radio: (1 - b) (1 - cos(m, t)) + b/D sum_d h(m[d] - t[d]), mean over images and positions; h(x) = x^2/2 where |x| < 1, else |x| - 1/2.

m: the student's embedding or, at every position of a stage, its map, through a linear layer, or through two with layer normalisation and
GELU between them. b: 0 for embeddings, 0.1 for maps. Of two sizes both maps go to the larger by bilinear interpolation: the value at place
y of H' is that at (y + 1/2) H/H' - 1/2, or at the edge where that lies beyond it.
"""

import math
from dataclasses import replace

import numpy as np
from helpers.pairs import FIVE, OTHER_STAGES, USUAL


def linear(vector, parameters, name):
    weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    return [float(b) + sum(float(w) * float(v) for w, v in zip(row, vector, strict=True)) for row, b in zip(weight, bias, strict=True)]


def headed(vector, parameters, name):
    if f"{name}.weight" in parameters:
        return linear(vector, parameters, name)
    hidden = linear(vector, parameters, f"{name}.0")
    mean = sum(hidden) / len(hidden)
    variance = sum((v - mean) ** 2 for v in hidden) / len(hidden)
    weight, bias = parameters[f"{name}.1.weight"], parameters[f"{name}.1.bias"]
    normal = [float(w) * (v - mean) / math.sqrt(variance + 1e-5) + float(b) for v, w, b in zip(hidden, weight, bias, strict=True)]
    return linear([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in normal], parameters, f"{name}.3")


def neighbours(place, length, goal):
    """The two positions that a place lies between, and their shares."""
    at = max((place + 0.5) * length / goal - 0.5, 0.0)
    low = int(at)
    return ((low, 1 - (at - low)), (min(low + 1, length - 1), at - low))


def stretched(features, height, width):
    out = np.zeros((*features.shape[:2], height, width))
    for n, c, y, x in np.ndindex(*out.shape):
        for row, down in neighbours(y, features.shape[2], height):
            for column, across in neighbours(x, features.shape[3], width):
                out[n, c, y, x] += down * across * float(features[n, c, row, column])
    return out


def distance(ours, theirs, share):
    ours, theirs = [float(v) for v in ours], [float(v) for v in theirs]
    norms = math.sqrt(sum(v * v for v in ours)) * math.sqrt(sum(v * v for v in theirs))
    cosine = sum(a * b for a, b in zip(ours, theirs, strict=True)) / norms if norms else 0.0
    steps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    smooth = sum(x * x / 2 if x < 1 else x - 0.5 for x in steps) / len(steps)
    return (1 - share) * (1 - cosine) + share * smooth


def dense(ours, theirs, parameters, name, share):
    count, _, height, width = ours.shape
    matched = np.zeros((count, theirs.shape[1], height, width))
    for n, y, x in np.ndindex(count, height, width):
        matched[n, :, y, x] = headed(ours[n, :, y, x], parameters, name)
    height, width = max(height, theirs.shape[2]), max(width, theirs.shape[3])
    matched, theirs = stretched(matched, height, width), stretched(theirs, height, width)
    places = list(np.ndindex(count, height, width))
    return sum(distance(matched[n, :, y, x], theirs[n, :, y, x], share) for n, y, x in places) / len(places)


def reference(student, teacher, options):
    parameters, total = options["parameters"], 0.0
    if options.get("features") != "dense":
        for ours, theirs in zip(student.embedding, teacher.embedding, strict=True):
            total += distance(headed(ours, parameters, "summary"), theirs, options.get("pooled_l1", 0.0)) / len(student.embedding)
    if options.get("features") != "pooled":
        stages = ("stage1", "stage2", "stage3") if options.get("stages") == "all" else ("stage3",)
        for number, stage in enumerate(stages):
            total += dense(student.maps[stage], teacher.maps[stage], parameters, f"dense.{number}", options.get("dense_l1", 0.1))
    return {"radio": total}


CASES = [
    {},
    {"features": "pooled", "pooled_l1": 0.3, "head": "linear"},
    {"features": "dense", "stages": "all", "dense_l1": 0.6},
    {"pooled_l1": 1.0, "dense_l1": 1.0},
]
BF16 = 2e-3  # a cosine taken from 1, and an absolute difference: measured 3.1e-4


def pairs(options):
    return [*USUAL, "wide embedding"]


def pulls(options):
    return set() if options["features"] == "dense" else {"embedding"}


def one_channel():
    return replace(FIVE, name="thin", taps=tuple(replace(tap, channels=1) if tap.name == "stage3" else tap for tap in FIVE.taps))


NARROW = replace(FIVE, name="narrow", embedding=1)
WRONG = [
    ({}, FIVE, NARROW, ["radio", "the embedding of narrow has width 1", "choose a teacher with a wider embedding"]),
    ({}, FIVE, one_channel(), ["radio", "stage3 of thin has one channel", "options.radio.features=pooled"]),
    ({}, FIVE, OTHER_STAGES, ["radio", "'stage3'", "big", "stage4"]),
    ({"features": "pooled", "stages": "all"}, FIVE, FIVE, ["options.radio: stages changes nothing with features=pooled"]),
    ({"features": "dense", "pooled_l1": 0.5}, FIVE, FIVE, ["options.radio: pooled_l1 changes nothing with features=dense"]),
]
