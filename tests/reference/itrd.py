"""itrd: a log2 sum_d |c_d - 1|^(2 alpha) + m (sum_{i,j} (G_s / tr G_s)^2 - sum_{i,j} (G_st / tr G_st)^2).

c_d = 1/N sum_n z_s[n,d] z_t[n,d] of W e_s (+ b) and e_t, z = (x - mean) / std over the batch, std divided by N - 1; G[i,j] the cosine of
samples i and j, of e_s or, where the widths differ, of W e_s + b; G_st = G_s G_t entry by entry.
"""

import math
from dataclasses import replace

import numpy as np
from helpers.pairs import FIVE

from .srd import projected


def standardised(column):
    mean = sum(float(v) for v in column) / len(column)
    deviation = math.sqrt(sum((float(v) - mean) ** 2 for v in column) / (len(column) - 1))
    return [(float(v) - mean) / deviation for v in column]


def correlation(ours, theirs, alpha):
    total = 0.0
    for one, other in zip(np.transpose(ours), np.transpose(theirs), strict=True):
        pairs = zip(standardised(one), standardised(other), strict=True)
        total += abs(sum(a * b for a, b in pairs) / len(one) - 1) ** (2 * alpha)
    return math.log2(total)


def cosine(one, other):
    product = sum(float(a) * float(b) for a, b in zip(one, other, strict=True))
    return product / math.sqrt(sum(float(a) ** 2 for a in one) * sum(float(b) ** 2 for b in other))


def squares(gram):
    """Of the entries, over the trace."""
    trace = sum(gram[i][i] for i in range(len(gram)))
    return sum((value / trace) ** 2 for row in gram for value in row)


def reference(student, teacher, options):
    ours, theirs = projected(student.embedding, options["parameters"]), teacher.embedding
    total = options.get("correlation", 2.0) * correlation(ours, theirs, options.get("alpha", 1.01))
    if student.embedding.shape == theirs.shape:
        ours = student.embedding
    alone = [[cosine(a, b) for b in ours] for a in ours]
    joint = [[value * cosine(a, b) for value, b in zip(row, theirs, strict=True)] for row, a in zip(alone, theirs, strict=True)]
    return {"itrd": total + options.get("mutual", 1.0) * (squares(alone) - squares(joint))}


CASES = [{}, {"alpha": 1.5, "mutual": 0.0}, {"correlation": 0.5, "mutual": 20.0}]
BF16 = 5e-3  # a logarithm that is close to 0 in some draws: measured 6.7e-4, up to 3.1e-3 over 20 draws
PULLS = {"embedding"}
NARROW = replace(FIVE, name="narrow", embedding=1)
WRONG = [({}, FIVE, NARROW, ["itrd", "the embedding of narrow has width 1", "set options.itrd.mutual=0", "choose a teacher with a wider"])]
