"""nd: 1/N sum_n (1 - <e_s, c> / (||c|| max(||e_s||, ||e_t||))), c the mean of the teacher's embeddings of the image's class.

Where the widths differ e_s = W d + b with d = 2 M x: x the batch-normalised embedding, M the mask of mgd with ratio 1/2.
"""

import math
from dataclasses import replace

from golden.inputs import INPUTS
from helpers.pairs import FIVE, USUAL

from flowdistill.methods.nd import nd_loss

from ._hashed import drawn
from .ickd import batch_normalised


def norm(vector):
    return math.sqrt(sum(float(v) ** 2 for v in vector))


def embedded(embedding, options):
    parameters = options["parameters"]
    x = batch_normalised(embedding[:, :, None, None], parameters["embedder.weight"], parameters["embedder.bias"])[:, :, 0, 0]
    rows = []
    for values, index in zip(x, options["indices"], strict=True):
        dropped = []
        for c, value in enumerate(values):
            word = drawn(options["buffers"]["embedder.salt"], options["epoch"], index, c)
            dropped.append(2 * value if word / 2**32 >= 0.5 else 0.0)
        weight, bias = parameters["embedder.linear.weight"], parameters["embedder.linear.bias"]
        rows.append([sum(float(w) * v for w, v in zip(row, dropped, strict=True)) + float(b) for row, b in zip(weight, bias, strict=True)])
    return rows


def reference(student, teacher, options):
    ours = embedded(student.embedding, options) if options["parameters"] else student.embedding
    total = 0.0
    for e_s, e_t, label in zip(ours, teacher.embedding, options["labels"], strict=True):
        mean = options["buffers"]["class_means"][label]
        product = sum(float(a) * float(b) for a, b in zip(e_s, mean, strict=True))
        total += 1 - product / (norm(mean) * max(norm(e_s), norm(e_t)))
    return {"nd": total / len(ours)}


def pairs(options):
    """A teacher with a wider embedding too."""
    return [*USUAL, "wide embedding"]


CASES = [{}]
BF16 = 1e-3  # a product with a direction, near 1 by itself: measured 3.9e-5, up to 2.3e-4 over 20 draws
PULLS = {"embedding"}
NARROW = replace(FIVE, name="narrow", embedding=1)
WRONG = [({}, FIVE, NARROW, ["nd", "the embedding of narrow has width 1", "choose a teacher with a wider embedding"])]
GOLDEN = {"nd/kd++": lambda: nd_loss(INPUTS["emb_s"], INPUTS["emb_t"], INPUTS["centres_t"][INPUTS["labels"]])}
