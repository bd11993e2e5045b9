"""cc: C[i, j] = sum_{p=0..P} exp(-2g) (2g)^p / p! <u_i, u_j>^p, u = e / ||e||, and 1/N^2 sum_{i,j} (C_s - C_t)^2."""

import math
from dataclasses import replace

from golden.inputs import INPUTS
from helpers.pairs import FIVE

from flowdistill.methods.cc import correlation_loss


def kernel(one, other, gamma, order):
    norms = math.sqrt(sum(float(v) ** 2 for v in one)) * math.sqrt(sum(float(v) ** 2 for v in other))
    cosine = sum(float(a) * float(b) for a, b in zip(one, other, strict=True)) / norms
    return sum(math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1))


def reference(student, teacher, options):
    gamma, order = options.get("gamma", 0.4), options.get("order", 2)
    batch = len(student.embedding)
    total = 0.0
    for i in range(batch):
        for j in range(batch):
            ours = kernel(student.embedding[i], student.embedding[j], gamma, order)
            theirs = kernel(teacher.embedding[i], teacher.embedding[j], gamma, order)
            total += (ours - theirs) ** 2
    return {"cc": total / batch**2}


CASES = [{}, {"gamma": 1.5}, {"order": 5}]
BF16 = 2e-3  # a square of the difference of two sums of powers of cosines: measured 6.7e-4
PULLS = {"embedding"}
NARROW = replace(FIVE, name="narrow", embedding=1)
WRONG = [
    ({}, NARROW, FIVE, ["cc", "the embedding of narrow has width 1", "choose a network with a wider embedding"]),
    ({}, FIVE, NARROW, ["cc", "the embedding of narrow has width 1", "choose a network with a wider embedding"]),
]
GOLDEN = {
    "cc/gaussian_P2": lambda: correlation_loss(INPUTS["emb_s"], INPUTS["emb_t"]),
    "cc/gaussian_P5": lambda: correlation_loss(INPUTS["emb_s"], INPUTS["emb_t"], order=5),
}
OTHER_LOSSES = {
    "cc/torchdistill": "torchdistill's kernel without L2 normalisation, and the norm itself over N^2",
    "cc/repdistiller": "RepDistiller's products of differences on neighbouring rows",
}
