"""wsld: T^2/N sum_n w[n] (-sum_k p_t[k] log p_s[k]), p = softmax(z / T).

w = 1 - exp(-max(c_s / (c_t + 1e-7), 0)), c = -log softmax(z)[y].
"""

import math

from golden.inputs import INPUTS
from helpers.pairs import FIVE, SEVEN

from flowdistill.methods.wsld import wsld_loss

from .kd import log_probabilities


def reference(student, teacher, options):
    temperature = options.get("T", 2.0)
    total = 0.0
    for ours, theirs, label in zip(student.logits, teacher.logits, options["labels"], strict=True):
        error_s, error_t = -log_probabilities(ours, 1.0)[label], -log_probabilities(theirs, 1.0)[label]
        weight = 1 - math.exp(-max(error_s / (error_t + 1e-7), 0))
        log_s, log_t = log_probabilities(ours, temperature), log_probabilities(theirs, temperature)
        for k in range(len(log_t)):
            total -= weight * math.exp(log_t[k]) * log_s[k]
    return {"wsld": temperature**2 * total / len(student.logits)}


CASES = [{}, {"T": 1.0}, {"T": 4.0}]
BF16 = 6e-3  # the weight moves with the ratio of two cross-entropies: measured 1.9e-3
PULLS = {"logits"}
DETACHED = 1  # w
WRONG = [({}, FIVE, SEVEN, ["wsld", "small has 5 classes", "big 7", "train both on the same classes"])]

GOLDEN = {"wsld/T2": lambda: wsld_loss(INPUTS["logits_s"], INPUTS["logits_t"], INPUTS["labels"])}
