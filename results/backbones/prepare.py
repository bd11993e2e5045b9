"""What the commands of the table need beside them.

python prepare.py images            # few.npz: the first ten of the 898 training digits of each class, and all 899 test digits
python prepare.py backbones RUNS    # runs 1 and 2 without their classifiers, and a ResNet-20 of random weights
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from networks import Backbone

from flowdistill.data import sources
from flowdistill.training.weights import load_weights

if sys.argv[1] == "images":
    digits = sources.SOURCES["digits"].read(Path())
    few = np.sort(np.concatenate([np.flatnonzero(digits.y_train == label)[:10] for label in range(10)]))
    np.savez("few.npz", x_train=digits.x_train[few], y_train=digits.y_train[few], x_test=digits.x_test, y_test=digits.y_test)
else:
    for number, head, name in ((1, "fc.", "resnet20"), (2, "head.", "vit")):
        weights, _ = load_weights(Path(sys.argv[2]) / str(number) / "student.safetensors")
        torch.save({key: value for key, value in weights.items() if not key.startswith(head)}, f"{name}.pt")
    torch.manual_seed(0)
    torch.save(Backbone(1).state_dict(), "random.pt")
