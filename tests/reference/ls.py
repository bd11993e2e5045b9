"""ls: N(z) = (z - mean(z)) / (std(z) + 1e-7) of every row, std divided by K - 1, then another method on N(z_s), N(z_t)."""

import math
from types import SimpleNamespace

import numpy as np
from golden.inputs import INPUTS
from helpers.pairs import FIVE, SEVEN, network

from flowdistill.methods.dkd import dkd_loss
from flowdistill.methods.kd import kd_loss
from flowdistill.methods.standardise import standardise

from . import dkd, kd, logits


def normal(rows):
    found = []
    for row in rows:
        mean = sum(float(z) for z in row) / len(row)
        deviation = math.sqrt(sum((float(z) - mean) ** 2 for z in row) / (len(row) - 1))
        found.append([(float(z) - mean) / (deviation + 1e-7) for z in row])
    return np.array(found)


def wrapping(name, module, bf16, cases, **defaults):
    """What the suites are to know of ``ls:name``; ``defaults`` are those options that differ from the method's own."""

    def reference(student, teacher, options):
        ours, theirs = (SimpleNamespace(**{**vars(who), "logits": normal(who.logits)}) for who in (student, teacher))
        return {f"ls:{term}": value for term, value in module.reference(ours, theirs, {**defaults, **options}).items()}

    one = network("small", classes=1)
    return SimpleNamespace(
        reference=reference,
        CASES=cases,
        BF16=bf16,
        PULLS={"logits"},
        WRONG=[
            ({}, FIVE, SEVEN, [f"ls:{name}: small has 5 classes", "big 7", "train both on the same classes"]),
            ({}, one, one, [f"ls:{name}: small has one class", "choose other data"]),
        ],
    )


WRAPPED = {
    "ls:kd": wrapping("kd", kd, 3e-3, [{}, {"T": 4.0}], T=2.0),  # measured 3.2e-4, up to 1.0e-3 over 20 draws
    "ls:dkd": wrapping("dkd", dkd, 4e-3, [{}, {"T": 1.0, "alpha": 2.0, "warmup": 3}], T=2.0),  # measured 3.9e-4, up to 1.3e-3
    "ls:logits": wrapping("logits", logits, 3e-3, [{}]),  # measured 3.9e-4, up to 1.0e-3
}
WRAPPED["ls:logits"].WRONG.append(({"on": "embedding"}, FIVE, FIVE, ["ls:logits", "compares no logits", "leave on=embedding out"]))


LOGITS = (INPUTS["logits_s"], INPUTS["logits_t"])
GOLDEN = {
    "ls+kd/T2": lambda: kd_loss(*map(standardise, LOGITS), 2.0),
    "ls+dkd/T2_1_8": lambda: dkd_loss(*map(standardise, LOGITS), INPUTS["labels"], 2.0),
}
ITS_MLKD = "the authors' mlkd: two views of the images, and standardised logits in its kd part alone"
OTHER_LOSSES = {
    "ls+kd/T2_population_std": "a standard deviation divided by K; the authors' code and the package divide by K - 1",
    "ls+mlkd/code_loss_kd": ITS_MLKD,
    "ls+mlkd/code_loss_cc": ITS_MLKD,
}
