"""sp: G[i, j] = sum over c, y, x of f[i] f[j], each row divided by its L2 norm, and 1/N^2 sum_{i,j} (G_t - G_s)^2.

last: of the last stage.  all: mean over the stages.
"""

import math
from dataclasses import replace

import torch
from golden.inputs import INPUTS
from helpers.pairs import FIVE, OTHER_STAGES, TWO_STAGES

from flowdistill.methods.sp import similarity_loss


def similarity(features):
    flat = [[float(v) for v in sample.reshape(-1)] for sample in features]
    rows = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in flat] for one in flat]
    norms = [math.sqrt(sum(v * v for v in row)) for row in rows]
    return [[v / norm for v in row] for row, norm in zip(rows, norms, strict=True)]


def reference(student, teacher, options):
    stages = ("stage3",) if options.get("stages", "last") == "last" else ("stage1", "stage2", "stage3")
    total = 0.0
    for stage in stages:
        ours, theirs = similarity(student.maps[stage]), similarity(teacher.maps[stage])
        square = 0.0
        for i in range(len(ours)):
            for j in range(len(ours)):
                square += (theirs[i][j] - ours[i][j]) ** 2
        total += square / len(ours) ** 2 / len(stages)
    return {"sp": total}


def golden(*stages):
    return torch.stack([similarity_loss(INPUTS[f"s_{stage}"], INPUTS[f"t_{stage}"]) for stage in stages]).mean()


CASES = [{}, {"stages": "all"}]
BF16 = 5e-3  # a square of the difference of two unit rows, whose entries are sums over a whole map: measured 1.5e-3
NO_STAGES = replace(FIVE, name="flat", taps=FIVE.taps[:1])
WRONG = [
    ({}, NO_STAGES, FIVE, ["sp", "flat has no stage", "choose a network with stages"]),
    ({}, FIVE, NO_STAGES, ["sp", "flat has no stage", "a method on embeddings such as pkt"]),
    ({"stages": "all"}, FIVE, TWO_STAGES, ["sp", "shallow 'stage1', 'stage2'", "choose networks with the same stages"]),
    ({"stages": "all"}, FIVE, OTHER_STAGES, ["'stage3'", "big", "stage4"]),
]
GOLDEN = {
    "sp/last_layer": lambda: golden("st3"),
    "sp/three_layers_mean": lambda: golden("st1", "st2", "st3"),
}
OTHER_LOSSES = {"sp/l1_rows": "torchdistill's rows of L1 norm 1 in place of L2"}
