"""tf_kd: KL(q || p_s), q = softmax(d / T), d = ``sure`` for the label and (1 - sure) / (K - 1) for the others.

code: 1/(N K) sum_n sum_k q[k] (log q[k] - log p_s[k]) with p_s = softmax(z); paper: T^2/N of the same sum with p_s = softmax(z / T).
"""

import math

import torch.nn.functional as F
from golden.inputs import INPUTS
from helpers.pairs import FIVE, network

from flowdistill.methods.tf_kd import tf_kd_loss

from .kd import log_probabilities


def reference(student, teacher, options):
    temperature, sure, mode = options.get("T", 20.0), options.get("sure", 0.99), options.get("mode", "code")
    total = 0.0
    for row, label in zip(student.logits, options["labels"], strict=True):
        virtual = [sure if k == label else (1 - sure) / (len(row) - 1) for k in range(len(row))]
        log_q = log_probabilities(virtual, temperature)
        log_s = log_probabilities(row, 1.0 if mode == "code" else temperature)
        for k in range(len(row)):
            total += math.exp(log_q[k]) * (log_q[k] - log_s[k])
    if mode == "paper":
        return {"tf_kd": temperature**2 * total / len(student.logits)}
    return {"tf_kd": total / (len(student.logits) * len(student.logits[0]))}


CASES = [{}, {"T": 0.5}, {"sure": 0.7, "T": 2.0}, {"mode": "paper"}, {"mode": "paper", "T": 2.0, "sure": 0.6}]
BF16 = 5e-3  # the rounding of the logits, weighted with q: measured 7.1e-4, up to 1.7e-3 over 20 draws
PULLS = {"logits"}
WRONG = [({}, network("small", classes=1), FIVE, ["tf_kd", "small has one class", "choose other data"])]


def with_task(alpha, multiplier, mode):
    """The authors' whole loss: (1 - alpha) of the cross-entropy and alpha times the multiplier of the regulariser."""
    logits, labels = INPUTS["logits_s"], INPUTS["labels"]
    return (1 - alpha) * F.cross_entropy(logits, labels) + alpha * multiplier * tf_kd_loss(logits, labels, mode=mode)


GOLDEN = {
    "tf_kd/reg_code": lambda: with_task(0.1, 100, "code"),
    "tf_kd/reg_formula": lambda: with_task(0.1, 1, "paper"),
}
OTHER_LOSSES = {"tf_kd/self_code": "self-training, which is kd by a student trained before, averaged over the classes too"}
