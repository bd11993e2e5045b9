"""crd: nce(o_s) + nce(o_t), o[i, j] = exp(<m_j, a_i> / T) / Z, Z = M * mean of exp over the first batch.

nce(o) = -1/N sum_i [log(o_+ / (o_+ + K/M + 1e-7)) + sum_j log((K/M) / (o_j + K/M + 1e-7))]. a: an embedding through a linear layer, to
norm 1; m: the row of the other network's bank. The jth negative of the image i is the image of place floor(w (M - n) / 2^32) among those of
other classes, sorted by class; w is the jth word of ``_hashed`` and n the number of images of its own class.
"""

import math

import numpy as np
import torch
from golden.inputs import INPUTS

from flowdistill.methods.crd import moved, nce_loss, similarities

from ._hashed import drawn


def projected(embedding, weight, bias):
    rows = []
    for e in embedding:
        row = [float(b) + sum(float(w) * float(x) for w, x in zip(ws, e, strict=True)) for ws, b in zip(weight, bias, strict=True)]
        norm = math.sqrt(sum(x * x for x in row))
        rows.append([x / norm for x in row])
    return rows


def negative(options, label, index, number):
    counts, order = options["buffers"]["counts"], options["buffers"]["order"].tolist()
    others = [image for image in order if not sum(counts[:label]) <= order.index(image) < sum(counts[: label + 1])]
    word = drawn(options["buffers"]["salt"], options["epoch"], index, number)
    return others[word * len(others) // 2**32]


def nce(anchors, bank, places, temperature, size):
    scores = [
        [math.exp(sum(float(m) * a for m, a in zip(bank[j], anchor, strict=True)) / temperature) for j in row]
        for anchor, row in zip(anchors, places, strict=True)
    ]
    z = size * sum(map(sum, scores)) / (len(scores) * len(scores[0]))
    noise = (len(scores[0]) - 1) / size
    total = 0.0
    for positive, *others in scores:
        total -= math.log(positive / z / (positive / z + noise + 1e-7))
        total -= sum(math.log(noise / (other / z + noise + 1e-7)) for other in others)
    return total / len(scores)


def reference(student, teacher, options):
    p, buffers, temperature = options["parameters"], options["buffers"], options.get("T", 0.07)
    ours = projected(student.embedding, p["embed_student.weight"], p["embed_student.bias"])
    theirs = projected(teacher.embedding, p["embed_teacher.weight"], p["embed_teacher.bias"])
    places = [
        [index, *(negative(options, label, index, j) for j in range(options["negatives"]))]
        for label, index in zip(options["labels"], options["indices"], strict=True)
    ]
    size = len(buffers["bank_student"])
    return {
        "crd": nce(ours, buffers["bank_teacher"], places, temperature, size)
        + nce(theirs, buffers["bank_student"], places, temperature, size)
    }


CASES = [{"negatives": 7, "dim": 6}, {"negatives": 40, "dim": 3, "T": 0.5, "momentum": 0.0}]
BF16 = 2e-2  # exponentials of cosines over T
PULLS = {"embedding"}
DETACHED = 4  # the first batch's means and what goes into the banks
WRONG: list[tuple[object, ...]] = []


def first_step():
    """Identity projections, and Z of this batch; the losses, and both banks after it."""
    ours, theirs = (torch.nn.functional.normalize(INPUTS[name], dim=1) for name in ("emb_s", "emb_t"))
    places, losses = INPUTS["crd_sample_idx"], []
    for anchors, bank in ((ours, INPUTS["crd_mem_t"]), (theirs, INPUTS["crd_mem_s"])):
        scores = similarities(anchors, bank.T, places, 0.07)
        losses.append(nce_loss(scores / (20 * scores.mean()), 20))
    return torch.stack(losses).sum()


def checksum(bank, latest):
    moving = INPUTS[bank].clone()
    moving[INPUTS["crd_idx"]] = moved(moving, INPUTS["crd_idx"], torch.nn.functional.normalize(INPUTS[latest], dim=1), 0.5)
    return (moving.flatten() * torch.from_numpy(np.cos(0.01 * np.arange(moving.numel())))).sum()


GOLDEN = {
    "crd/first_step": first_step,
    "crd/bank_s_after_step": lambda: checksum("crd_mem_s", "emb_s"),
    "crd/bank_t_after_step": lambda: checksum("crd_mem_t", "emb_t"),
}
