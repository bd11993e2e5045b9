"""ctkd: kd at the temperature T = t_start + t_end / (1 + exp(-theta)).

theta's gradient is multiplied by lambda = (cos(pi min(e, E) / E) - 1) / 2 <= 0, e = epoch + 1: the value is that of
c + lambda (theta - c) for a constant c that equals theta.
"""

import math

import torch
from golden.inputs import INPUTS
from helpers.pairs import FIVE, SEVEN, network

from flowdistill.methods.ctkd import CTKD, ctkd_loss
from flowdistill.types import Batch, Outputs

from . import kd


def reference(student, teacher, options):
    theta = float(options["parameters"]["theta"])
    temperature = options.get("t_start", 1.0) + options.get("t_end", 20.0) / (1 + math.exp(-theta))
    return {"ctkd": kd.reference(student, teacher, {"T": temperature})["kd"]}


CASES = [{}, {"t_start": 2.5, "t_end": 4.0}, {"ramp": 3}, {"ramp": 7}]
BF16 = 5e-3  # as kd: measured 4.8e-5, up to 1.5e-3 over 20 draws
PULLS = {"logits"}
DETACHED = 1  # theta, of which only the share lambda moves
WRONG = [({}, FIVE, SEVEN, ["ctkd", "small has 5 classes", "big 7", "train both on the same classes"])]


def gradient_in_the_fifth_epoch():
    """By the method itself, so that the curriculum is the one that it follows.

    50 digits of the formula give -0.01494573166559662555, which this meets to 1e-12; the entry is 3.8e-8 off that.
    """
    ten = network("ten", classes=10)
    method = CTKD(student=ten, teacher=ten).double()
    student, teacher = (Outputs(INPUTS[f"logits_{who}"], INPUTS[f"emb_{who}"]) for who in "st")
    loss = method(student, teacher, Batch(INPUTS["labels"], epoch=torch.tensor(4)))["ctkd"]
    return torch.autograd.grad(loss, method.theta)[0]


GOLDEN = {
    "ctkd/theta1": lambda: ctkd_loss(INPUTS["logits_s"], INPUTS["logits_t"], torch.tensor(1.0, dtype=torch.float64)),
    "ctkd/theta_grad_epoch5": gradient_in_the_fifth_epoch,
}
