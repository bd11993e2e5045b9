"""ttm: 1/N sum_n sum_k p_T[k] (log p_T[k] - log q[k]), p_T = p^(1/T) / sum_j p[j]^(1/T) of the teacher's p, q of the student at 1."""

import math

from helpers.pairs import FIVE, SEVEN

from .kd import log_probabilities


def transformed(theirs, temperature):
    """The teacher's probabilities to the power of 1/T, normalised, and what they summed to."""
    powers = [math.exp(a) ** (1 / temperature) for a in log_probabilities(theirs, 1.0)]
    return [power / sum(powers) for power in powers], sum(powers)


def divergence(ours, theirs, temperature):
    soft, _ = transformed(theirs, temperature)
    return sum(a * (math.log(a) - b) for a, b in zip(soft, log_probabilities(ours, 1.0), strict=True))


def reference(student, teacher, options):
    pairs = zip(student.logits, teacher.logits, strict=True)
    return {"ttm": sum(divergence(ours, theirs, options.get("T", 5.0)) for ours, theirs in pairs) / len(student.logits)}


CASES = [{}, {"T": 10.0}, {"T": 1.0}]
BF16 = 5e-3  # the teacher's logits over T, the student's as they are: measured 6.3e-4, up to 2.6e-3 over 20 draws
PULLS = {"logits"}
WRONG = [({}, FIVE, SEVEN, ["ttm", "small has 5 classes", "big 7", "train both on the same classes"])]
