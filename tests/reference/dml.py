"""dml: the sum over the peers of 1/N sum_n sum_k p_k (log p_k - log q_k), p = softmax of the peer's logits, q of the student's."""

from golden.inputs import INPUTS

from flowdistill.methods.dml import mutual_loss

from . import kd


def reference(student, teacher, options):
    return {"dml": sum(kd.reference(student, peer, {"T": 1.0})["kd"] for peer in options["peers"])}


CASES = [{}]
BF16 = 5e-3  # as kd
PULLS = {"logits"}
DETACHED = 1  # the peer
WRONG = []
GOLDEN = {
    "dml/net1": lambda: mutual_loss(INPUTS["logits_s"], INPUTS["logits_t"]),
    "dml/net2": lambda: mutual_loss(INPUTS["logits_t"], INPUTS["logits_s"]),
}
