"""wttm: 1/N sum_n (sum_j p[j]^(1/T)) KL(p_T || q), p of the teacher, p_T and q as ttm has them."""

from helpers.pairs import FIVE, SEVEN

from .ttm import divergence, transformed


def reference(student, teacher, options):
    temperature, total = options.get("T", 5.0), 0.0
    for ours, theirs in zip(student.logits, teacher.logits, strict=True):
        total += transformed(theirs, temperature)[1] * divergence(ours, theirs, temperature)
    return {"wttm": total / len(student.logits)}


CASES = [{}, {"T": 10.0}]
BF16 = 3e-3  # measured 6.3e-4, up to 1.4e-3 over 20 draws
PULLS = {"logits"}
WRONG = [({}, FIVE, SEVEN, ["wttm", "small has 5 classes", "big 7", "train both on the same classes"])]
