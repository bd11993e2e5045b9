"""npz: the weights as numpy arrays, for programs without PyTorch."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from flowdistill.runner.export import FORMATS, Answer, Format, Program

METADATA = "metadata"


def write(program: Program, image: Tensor, metadata: Mapping[str, str]) -> bytes:
    """All weights and buffers under the program's names for them, and under ``metadata`` each key and value."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: value.numpy() for name, value in program.state_dict().items()}
    arrays[METADATA] = np.array(list(metadata.items()))
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read(content: bytes, program: Program) -> Answer:
    """What the program answers with the file's weights. ``strict``: with none of its own."""
    with np.load(io.BytesIO(content)) as file:
        weights = {name: torch.from_numpy(file[name]) for name in file.files if name != METADATA}
    return lambda images: functional_call(program, weights, images, strict=True)


FORMATS.register("npz")(Format(".npz", write, read))
