"""logits: 1/(N K) sum_{n,k} (z_s - z_t)^2; with on=embedding 1/(N D) sum_{n,d} (e_s - e_t)^2."""

from dataclasses import replace

from golden.inputs import INPUTS
from helpers.pairs import FIVE, SEVEN

from flowdistill.methods.logits import logits_loss


def reference(student, teacher, options):
    compared = options.get("on", "logits")
    ours, theirs = getattr(student, compared), getattr(teacher, compared)
    batch, width = ours.shape
    total = 0.0
    for n in range(batch):
        for k in range(width):
            total += (float(ours[n, k]) - float(theirs[n, k])) ** 2
    return {"logits": total / (batch * width)}


def pulls(options):
    return {options.get("on", "logits")}


CASES = [{}, {"on": "embedding"}]
BF16 = 5e-3  # a square, so twice the error of z_s - z_t: measured 2.3e-3
WRONG = [
    ({}, FIVE, SEVEN, ["logits", "small has 5 classes", "big 7", "train both on the same classes"]),
    (
        {"on": "embedding"},
        FIVE,
        replace(FIVE, name="big", embedding=6),
        ["logits: the embedding of small has width 4, that of big 6", "choose networks of equal width"],
    ),
]
GOLDEN = {
    "logits/mse": lambda: logits_loss(INPUTS["logits_s"], INPUTS["logits_t"]),
    "logits/seed_on_embedding": lambda: logits_loss(INPUTS["emb_s"], INPUTS["emb_t"]),
}
