"""rkd: distance 1/N^2 sum_{i,j} h(D_s - D_t), D[i, j] = ||e_i - e_j|| / mu, mu the mean of the distances above 0, and
angle 1/N^3 sum_{i,j,k} h(A_s - A_t), A[i, j, k] = <u_ij, u_ik>, u_ij = (e_j - e_i) / ||e_j - e_i||; h(x) = x^2 / 2 or |x| - 1/2.
"""

import math
from dataclasses import replace

from golden.inputs import INPUTS
from helpers.pairs import FIVE

from flowdistill.methods.rkd import angle_loss, distance_loss


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def difference(one, other):
    return [float(b) - float(a) for a, b in zip(one, other, strict=True)]


def length(vector):
    return math.sqrt(sum(v * v for v in vector))


def distances(embedding):
    table = [[length(difference(one, other)) for other in embedding] for one in embedding]
    positive = [d for row in table for d in row if d > 0]
    mean = sum(positive) / len(positive)
    return [[d / mean for d in row] for row in table]


def angle(embedding, i, j, k):
    to_j, to_k = difference(embedding[i], embedding[j]), difference(embedding[i], embedding[k])
    lengths = length(to_j) * length(to_k)
    return sum(a * b for a, b in zip(to_j, to_k, strict=True)) / lengths if lengths > 0 else 0.0


def reference(student, teacher, options):
    ours, theirs = student.embedding, teacher.embedding
    batch = range(len(ours))
    d_s, d_t = distances(ours), distances(theirs)
    by_distance = sum(huber(d_s[i][j] - d_t[i][j]) for i in batch for j in batch) / len(ours) ** 2
    by_angle = 0.0
    for i in batch:
        for j in batch:
            for k in batch:
                by_angle += huber(angle(ours, i, j, k) - angle(theirs, i, j, k)) / len(ours) ** 3
    return {"rkd": options.get("distance", 25.0) * by_distance + options.get("angle", 50.0) * by_angle}


def golden(teacher="emb_t", distance=0.0, angle=0.0):
    pair = (INPUTS["emb_s"], INPUTS[teacher])
    return distance * distance_loss(*pair) + angle * angle_loss(*pair)


CASES = [{}, {"distance": 1.0, "angle": 0.0}, {"distance": 0.0, "angle": 2.0}]
BF16 = 1e-3  # differences of embeddings far apart: measured 2.9e-4
PULLS = {"embedding"}
NARROW = replace(FIVE, name="narrow", embedding=1)
WRONG = [
    ({}, NARROW, FIVE, ["rkd", "the embedding of narrow has width 1", "set options.rkd.angle=0"]),
    ({}, FIVE, NARROW, ["rkd", "the embedding of narrow has width 1", "choose a network with a wider embedding"]),
]
GOLDEN = {
    "rkd/distance": lambda: golden(distance=1.0),
    "rkd/angle": lambda: golden(angle=1.0),
    "rkd/25_50": lambda: golden(distance=25.0, angle=50.0),
    "rkd/dim_mismatch": lambda: golden("emb_t48", distance=25.0, angle=50.0),
}
