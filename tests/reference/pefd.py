"""pefd: g = 1/Q sum_q ReLU(W_q e_s + b_q), and 1/N sum_n (1 - cos(g_n, e_t,n))."""

import math
from dataclasses import replace

import torch
from golden.inputs import INPUTS
from helpers.pairs import FIVE

from flowdistill.methods.pefd import direction_loss, ensemble


def reference(student, teacher, options):
    count, width = options.get("projectors", 3), teacher.embedding.shape[1]
    weight, bias = options["parameters"]["projectors.weight"], options["parameters"]["projectors.bias"]
    total = 0.0
    for ours, theirs in zip(student.embedding, teacher.embedding, strict=True):
        g = [0.0] * width
        for q in range(count):
            for d in range(width):
                row = q * width + d
                g[d] += max(sum(float(w) * float(v) for w, v in zip(weight[row], ours, strict=True)) + float(bias[row]), 0.0) / count
        length = max(math.sqrt(sum(v * v for v in g)), 1e-6)  # with few projectors a sample can switch every ReLU off
        norms = length * math.sqrt(sum(float(v) ** 2 for v in theirs))
        total += 1 - sum(a * float(b) for a, b in zip(g, theirs, strict=True)) / norms
    return {"pefd": total / len(student.embedding)}


def identity():
    projected = ensemble(INPUTS["emb_s"], torch.eye(32, dtype=torch.float64).expand(3, -1, -1), torch.zeros(3, 32, dtype=torch.float64))
    return direction_loss(projected, INPUTS["emb_t"])


CASES = [{}, {"projectors": 1}]
BF16 = 1e-3  # a cosine, taken from 1, of embeddings far apart: measured 7.4e-5
PULLS = {"embedding"}
NARROW = replace(FIVE, name="narrow", embedding=1)
WRONG = [({}, FIVE, NARROW, ["pefd", "the embedding of narrow has width 1", "choose a teacher with a wider embedding"])]
GOLDEN = {"pefd/identity": identity}
