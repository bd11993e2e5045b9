"""cwd: tau^2/(N C) sum_{n,c} KL(phi_t || phi_s), phi = softmax over the positions of f[n, c] / tau, summed over the stages.

The larger map is average-pooled to the smaller, and a 1x1 convolution makes the student's channels the teacher's.
"""

import math

from golden.inputs import INPUTS
from helpers.pairs import FIVE, OTHER_STAGES, TWO_STAGES

from flowdistill.methods.cwd import cwd_loss

from .fsp import adapted, pool
from .kd import log_probabilities


def reference(student, teacher, options):
    tau = options.get("tau", 4.0)
    stages = ("stage1", "stage2", "stage3") if options.get("stages") == "all" else ("stage3",)
    total = 0.0
    for stage in stages:
        ours, theirs = student.maps[stage], teacher.maps[stage]
        height, width = min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3])
        ours = adapted(pool(ours, height, width, "avg"), options["parameters"].get(f"adapters.{stage}.weight"))
        theirs = pool(theirs, height, width, "avg")
        batch, channels = theirs.shape[:2]
        for n in range(batch):
            for c in range(channels):
                log_s, log_t = (log_probabilities([v for row in x[n, c] for v in row], tau) for x in (ours, theirs))
                kl = sum(math.exp(t) * (t - s) for s, t in zip(log_s, log_t, strict=True))
                total += tau**2 * kl / (batch * channels)
    return {"cwd": total}


CASES = [{}, {"tau": 1.0}, {"stages": "all"}]
BF16 = 2e-3  # a square, nearly, of the difference of two maps: measured 0.5e-3
WRONG = [
    ({}, FIVE, TWO_STAGES, ["cwd", "small are 'stage1', 'stage2', 'stage3'", "shallow 'stage1', 'stage2'"]),
    ({}, FIVE, OTHER_STAGES, ["cwd", "'stage3'", "big", "stage4"]),
]
GOLDEN = {
    "cwd/tau1": lambda: cwd_loss(INPUTS["s_st2"], INPUTS["t_st2"], 1.0),
    "cwd/tau4": lambda: cwd_loss(INPUTS["s_st2"], INPUTS["t_st2"], 4.0),
}
