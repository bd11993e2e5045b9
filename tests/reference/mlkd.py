"""mlkd: sum over T in 2, 3, base, 5, 6 of kd(T) + 1/K ||P_t' P_t - P_s' P_s||_F^2 + 1/N ||P_t P_t' - P_s P_s'||_F^2, P = softmax(z / T)."""

from golden.inputs import INPUTS
from helpers.pairs import FIVE, SEVEN

from flowdistill.methods.mlkd import batch_loss, class_loss, mlkd_loss

from . import kd
from .dkd import probabilities


def similarities(rows):
    return [[sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]


def distance(ours, theirs):
    """1/n of the squared distance of the similarities of n rows."""
    total = 0.0
    for row_s, row_t in zip(similarities(ours), similarities(theirs), strict=True):
        for a, b in zip(row_s, row_t, strict=True):
            total += (b - a) ** 2
    return total / len(ours)


def reference(student, teacher, options):
    total = 0.0
    for temperature in (2.0, 3.0, options.get("T", 4.0), 5.0, 6.0):
        p_s, p_t = ([probabilities(row, temperature) for row in who.logits] for who in (student, teacher))
        total += kd.reference(student, teacher, {"T": temperature})["kd"]
        total += distance(p_s, p_t)
        total += distance(list(zip(*p_s, strict=True)), list(zip(*p_t, strict=True)))
    return {"mlkd": total}


CASES = [{}, {"T": 1.0}]
BF16 = 5e-3  # as kd, the rest is small: measured 1.7e-3, up to 1.9e-3 over 20 draws
PULLS = {"logits"}
WRONG = [({}, FIVE, SEVEN, ["mlkd", "small has 5 classes", "big 7", "train both on the same classes"])]

INPUT = (INPUTS["logits_s"], INPUTS["logits_t"])
GOLDEN = {
    "mlkd/paper_unmasked": lambda: mlkd_loss(*INPUT),
    "mlkd/cc_T4": lambda: class_loss(*INPUT, 4.0),
    "mlkd/bc_T4": lambda: batch_loss(*INPUT, 4.0),
}
TWO_VIEWS = "the authors' code: two views of the images, and parts multiplied by the share of unsure samples or classes"
OTHER_LOSSES = {"mlkd/code_loss_kd": TWO_VIEWS, "mlkd/code_loss_cc": TWO_VIEWS, "mlkd/code_loss_bc": TWO_VIEWS}
