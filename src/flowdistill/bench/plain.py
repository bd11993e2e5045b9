"""The loop that a user would write, and the one of a user who knows PyTorch well.

Plain: torchvision transforms on PIL images in a DataLoader, eager float32, ``loss.item()`` each step. Strong: the same data, with bf16
autocast, channels_last and torch.compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import DeviceData
from ..data.dataset import ImageData, Pictures
from ..device import autocast
from ..training.student import Student
from ..types import Batch


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """A data set as most repositories write it."""

    def __init__(self, data: ImageData, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        from torchvision import transforms

        assert not isinstance(data.x_train, Pictures)
        self.images, self.labels = data.x_train, data.y_train
        crop = transforms.RandomCrop(data.x_train.shape[1:3], padding=data.pad, padding_mode="reflect")
        flip = [transforms.RandomHorizontalFlip()] if data.flip else []
        self.transform = transforms.Compose([crop, *flip, transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


class PlainLoop:
    """A student that is taught by a plain loop.

    Args:
        member: gives network, method and weights; its optimiser is not used.
        workers: those of the DataLoader.
        strong: whether it has bf16, channels_last and torch.compile.
    """

    def __init__(self, member: Student, teacher: nn.Module, images: ImageData, data: DeviceData, workers: int, *, strong: bool) -> None:
        self.member, self.data, self.strong = member, data, strong
        self.layout = torch.channels_last if strong else torch.contiguous_format
        self.student: Any = member.net.to(memory_format=self.layout)
        self.teacher: Any = teacher.eval().requires_grad_(False).to(memory_format=self.layout)
        if strong:
            self.student, self.teacher = torch.compile(self.student), torch.compile(self.teacher)
        self.optimizer = torch.optim.SGD(member.net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        shown = Images(images, data.normalisation.mean, data.normalisation.std)
        self.loader = torch.utils.data.DataLoader(
            shown, member.train.batch_size, shuffle=True, drop_last=True, num_workers=workers, pin_memory=data.device.type == "cuda"
        )

    def steps(self) -> Iterator[None]:
        """One epoch, one step per turn."""
        device, method, weights = self.data.device, self.member.method, self.member.resolved.weights
        self.member.net.train()
        for images, labels in self.loader:
            images = images.to(device, non_blocking=True, memory_format=self.layout)
            labels = labels.to(device, non_blocking=True)
            with autocast(device, "bf16" if self.strong else "fp32"):
                student_outputs = self.student(images)
                with torch.no_grad():
                    teacher_outputs = self.teacher(images) if method.uses_teacher else None
            loss = F.cross_entropy(student_outputs.logits.float(), labels)
            if method.terms:
                loss = loss + sum(weights[term] * value for term, value in method(student_outputs, teacher_outputs, Batch(labels)).items())
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            loss.item()
            yield
