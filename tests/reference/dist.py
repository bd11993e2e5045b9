"""dist: T^2 (beta inter + gamma intra), P = softmax(z / T).

inter = 1 - 1/N sum_n rho(P_s[n, :], P_t[n, :]), intra = 1 - 1/K sum_k rho(P_s[:, k], P_t[:, k]),
rho(a, b) = <a - mean a, b - mean b> / (||a - mean a|| ||b - mean b|| + 1e-8).
"""

import math

from golden.inputs import INPUTS
from helpers.pairs import FIVE, SEVEN

from flowdistill.methods.dist import dist_loss, relations

from .dkd import probabilities


def rho(a, b):
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    product = square_a = square_b = 0.0
    for x, y in zip(a, b, strict=True):
        product += (x - mean_a) * (y - mean_b)
        square_a += (x - mean_a) ** 2
        square_b += (y - mean_b) ** 2
    return product / (math.sqrt(square_a) * math.sqrt(square_b) + 1e-8)


def reference(student, teacher, options):
    temperature = options.get("T", 4.0)
    p_s = [probabilities(row, temperature) for row in student.logits]
    p_t = [probabilities(row, temperature) for row in teacher.logits]
    batch, classes = student.logits.shape
    inter = intra = 1.0
    for n in range(batch):
        inter -= rho(p_s[n], p_t[n]) / batch
    for k in range(classes):
        intra -= rho([row[k] for row in p_s], [row[k] for row in p_t]) / classes
    return {"dist": temperature**2 * (options.get("beta", 1.0) * inter + options.get("gamma", 1.0) * intra)}


CASES = [{}, {"T": 1.0}, {"beta": 0.0}, {"gamma": 0.0}, {"beta": 0.5, "gamma": 2.0}]
BF16 = 5e-3  # a correlation, in which errors average out: measured 3.4e-4, up to 2.2e-3 over 20 draws
PULLS = {"logits"}
WRONG = [({}, FIVE, SEVEN, ["dist", "small has 5 classes", "big 7", "train both on the same classes"])]

INPUT = (INPUTS["logits_s"], INPUTS["logits_t"])
GOLDEN = {
    "dist/tau1": lambda: dist_loss(*INPUT, temperature=1.0),
    "dist/inter": lambda: relations(*INPUT, temperature=1.0).inter,
    "dist/intra": lambda: relations(*INPUT, temperature=1.0).intra,
    "dist/tau4_code": lambda: dist_loss(*INPUT),
    "dist/tau4_appendix": lambda: dist_loss(*INPUT) / 4**2,  # the appendix has no T^2
}
