"""pkt: u = e / (||e|| + eps), k[i, j] = (<u_i, u_j> + 1) / 2, P[i, j] = k[i, j] / sum_j k[i, j], and
1/N^2 sum_{i,j} P_t log((P_t + eps) / (P_s + eps)).
"""

import math
from dataclasses import replace

from golden.inputs import INPUTS
from helpers.pairs import FIVE

from flowdistill.methods.pkt import pkt_loss


def probabilities(embedding, eps):
    units = []
    for row in embedding:
        norm = math.sqrt(sum(float(v) ** 2 for v in row))
        units.append([float(v) / (norm + eps) for v in row])
    found = []
    for one in units:
        kernel = [(sum(a * b for a, b in zip(one, other, strict=True)) + 1) / 2 for other in units]
        found.append([k / sum(kernel) for k in kernel])
    return found


def reference(student, teacher, options):
    eps = options.get("eps", 1e-7)
    ours, theirs = probabilities(student.embedding, eps), probabilities(teacher.embedding, eps)
    total = 0.0
    for i in range(len(ours)):
        for j in range(len(ours)):
            total += theirs[i][j] * math.log((theirs[i][j] + eps) / (ours[i][j] + eps))
    return {"pkt": total / len(ours) ** 2}


CASES = [{}, {"eps": 1e-6}]
BF16 = 1e-3  # cosines of embeddings far apart, shifted by 1 before anything is divided: measured 2.9e-4
PULLS = {"embedding"}
NARROW = replace(FIVE, name="narrow", embedding=1)
WRONG = [
    ({}, NARROW, FIVE, ["pkt", "the embedding of narrow has width 1", "choose a network with a wider embedding"]),
    ({}, FIVE, NARROW, ["pkt", "the embedding of narrow has width 1", "choose a network with a wider embedding"]),
]
GOLDEN = {
    "pkt/eps1e-7": lambda: pkt_loss(INPUTS["emb_s"], INPUTS["emb_t"]),
    "pkt/eps1e-6": lambda: pkt_loss(INPUTS["emb_s"], INPUTS["emb_t"], eps=1e-6),
}
