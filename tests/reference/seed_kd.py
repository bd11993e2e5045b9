"""seed_kd: -1/N sum_n sum_j p_t[n, j] log p_s[n, j], p[n, j] = exp(<z_n, d_j> / T) / sum_i exp(<z_n, d_i> / T).

d_0 is the teacher's embedding of image n, d_1, ... the rows of the queue; z is the teacher's embedding, or the student's through two linear
layers with a ReLU between them; all have norm 1. T is 0.2 for the student and 0.01 for the teacher.
"""

import math
from dataclasses import replace

from helpers.pairs import FIVE, USUAL

from .radio import linear


def normed(vector):
    length = math.sqrt(sum(float(v) ** 2 for v in vector))
    return [float(v) / length for v in vector] if length else [0.0 for _ in vector]


def log_probabilities(z, rows, temperature):
    scores = [sum(a * float(b) for a, b in zip(z, row, strict=True)) / temperature for row in rows]
    top = max(scores)
    total = top + math.log(sum(math.exp(score - top) for score in scores))
    return [score - total for score in scores]


def reference(student, teacher, options):
    total = 0.0
    for ours, theirs in zip(student.embedding, teacher.embedding, strict=True):
        hidden = [max(v, 0.0) for v in linear(ours, options["parameters"], "projector.0")]
        z_s, z_t = normed(linear(hidden, options["parameters"], "projector.2")), normed(theirs)
        rows = [z_t, *options["buffers"]["queue"]]
        log_s = log_probabilities(z_s, rows, options.get("T", 0.2))
        log_t = log_probabilities(z_t, rows, options.get("T_teacher", 0.01))
        total -= sum(math.exp(p) * q for p, q in zip(log_t, log_s, strict=True)) / len(student.embedding)
    return {"seed_kd": total}


CASES = [{"queue": 7}, {"queue": 40, "T": 0.5, "T_teacher": 0.1}, {"queue": 2, "T_teacher": 0.5}]
BF16 = 2e-3  # cosines over T: measured 1.3e-4
PULLS = {"embedding"}
DETACHED = 1  # the teacher's embeddings, which stay in the queue


def pairs(options):
    return [*USUAL, "wide embedding"]


NARROW = replace(FIVE, name="narrow", embedding=1)
WRONG = [({}, FIVE, NARROW, ["seed_kd", "the embedding of narrow has width 1", "choose a teacher with a wider embedding"])]
