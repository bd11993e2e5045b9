"""irg: vertex 1/(N K) sum (z_s - z_t)^2.

edge: 1/N^2 sum_{i,j} (d_s - d_t)^2, d[i, j] = ||x_i - x_j||^2 over its maximum, averaged over x = embedding, stage2, stage3.
transform: 1/N sum_i (r_s - r_t)^2, r[i] = ||a_i - b_i||^2 over its maximum, a and b stage2 and stage3, averaged to the smaller channels
and sizes of both.
"""

from dataclasses import replace

from golden.inputs import INPUTS
from helpers.pairs import FIVE, OTHER_STAGES, SEVEN, TWO_STAGES

from flowdistill.methods.irg import edge_loss, transformation_loss, vertex_loss

from .fsp import pool


def square(one, other):
    return sum((float(a) - float(b)) ** 2 for a, b in zip(one.reshape(-1), other.reshape(-1), strict=True))


def edge(ours, theirs):
    batch = range(len(ours))
    d_s, d_t = ([[square(x[i], x[j]) for j in batch] for i in batch] for x in (ours, theirs))
    most_s, most_t = (max(max(row) for row in d) for d in (d_s, d_t))
    return sum((d_s[i][j] / most_s - d_t[i][j] / most_t) ** 2 for i in batch for j in batch) / len(ours) ** 2


def average(x, channels, height, width):
    x = pool(x, height, width, "avg")
    flat = pool(x.reshape(len(x), 1, x.shape[1], height * width), channels, height * width, "avg")
    return flat.reshape(len(x), channels, height, width)


def moved(maps):
    first, second = maps["stage2"], maps["stage3"]
    size = [min(first.shape[axis], second.shape[axis]) for axis in (1, 2, 3)]
    a, b = average(first, *size), average(second, *size)
    distances = [square(a[i], b[i]) for i in range(len(a))]
    return [d / max(distances) for d in distances]


def reference(student, teacher, options):
    vertex = square(student.logits, teacher.logits) / student.logits.size
    edges = edge(student.embedding, teacher.embedding)
    for stage in ("stage2", "stage3"):
        edges += edge(student.maps[stage], teacher.maps[stage])
    r_s, r_t = moved(student.maps), moved(teacher.maps)
    transform = sum((a - b) ** 2 for a, b in zip(r_s, r_t, strict=True)) / len(r_s)
    parts = (("vertex", 0.1, vertex), ("edge", 5.0, edges / 3), ("transform", 5.0, transform))
    return {"irg": sum(options.get(name, default) * part for name, default, part in parts)}


def golden(vertex=0.0, edge=0.0, transform=0.0):
    pairs = [(INPUTS[f"{name}_s"], INPUTS[f"{name}_t"]) for name in ("logits", "emb")]
    pairs += [(INPUTS[f"s_{stage}"], INPUTS[f"t_{stage}"]) for stage in ("st2", "st3")]
    edges = sum(edge_loss(*pair) for pair in pairs[1:]) / 3
    moves = transformation_loss((pairs[2][0], pairs[3][0]), (pairs[2][1], pairs[3][1]))
    return vertex * vertex_loss(*pairs[0]) + edge * edges + transform * moves


CASES = [{}, {"vertex": 1.0}, {"edge": 1.0}, {"transform": 1.0}]
BF16 = 1e-3  # squares of differences of numbers of order 1: measured 1.7e-4
PULLS = {"logits", "embedding"}
ONE_STAGE = replace(TWO_STAGES, name="short", taps=TWO_STAGES.taps[:3])
WRONG = [
    ({}, FIVE, SEVEN, ["irg", "small has 5 classes", "big 7", "train both on the same classes"]),
    ({}, FIVE, TWO_STAGES, ["irg", "shallow 'stage1', 'stage2'", "choose networks with the same stages"]),
    ({}, FIVE, OTHER_STAGES, ["'stage3'", "big", "stage4"]),
    ({}, ONE_STAGE, ONE_STAGE, ["irg", "short and short have 'stage1' alone", "choose networks with more of them"]),
]
GOLDEN = {
    "irg/0.1_5_5": lambda: golden(0.1, 5.0, 5.0),
    "irg/vertex": lambda: golden(vertex=1.0),
    "irg/edge": lambda: golden(edge=1.0),
    "irg/transform": lambda: golden(transform=1.0),
}
