"""srd: log(1e-5 + sum_{n,d} |BN(W e_s)[n,d] - BN(e_t)[n,d]|^alpha), BN(x) = (x - mean) / sqrt(variance + 1e-4) over the batch."""

import math

import numpy as np
from helpers.pairs import FIVE


def batch_normalised(rows):
    columns = []
    for column in np.transpose(rows):
        mean = sum(float(v) for v in column) / len(column)
        variance = sum((float(v) - mean) ** 2 for v in column) / len(column)
        columns.append([(float(v) - mean) / math.sqrt(variance + 1e-4) for v in column])
    return np.transpose(columns)


def projected(embedding, parameters):
    """W e + b of every sample; b where there is one."""
    weight = parameters["projector.weight"]
    rows = list(zip(weight, parameters.get("projector.bias", np.zeros(len(weight))), strict=True))
    return [[sum(float(w) * float(v) for w, v in zip(row, e, strict=True)) + float(b) for row, b in rows] for e in embedding]


def reference(student, teacher, options):
    ours, theirs = batch_normalised(projected(student.embedding, options["parameters"])), batch_normalised(teacher.embedding)
    powers = [abs(a - b) ** options.get("alpha", 4.0) for a, b in zip(ours.flat, theirs.flat, strict=True)]
    return {"srd": math.log(1e-5 + sum(powers))}


CASES = [{}, {"alpha": 1.0}, {"alpha": 2.5}]
BF16 = 1e-3  # a logarithm: measured 2.1e-4, up to 4.3e-4 over 20 draws
PULLS = {"embedding"}
WRONG = [({"alpha": 0.5}, FIVE, FIVE, ["options.srd.alpha", "0.5", "1"])]
