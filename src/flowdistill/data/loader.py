"""From a data set to normalised batches: the split, the tensors on the device, and one stream of batches a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..checks import UserError
from ..device import free_memory
from ..taps import NO_LABEL, Batch, Targets
from .augment import Draws, crop_and_flip, draw_boxes, draw_epoch, draw_shares, mix, partners, reflect_pad, resize_and_flip
from .images import ImageData, Labels
from .sources import stratified

HOLDOUT_PART = 10  # a tenth of each class is held out
RESIDENT_SHARE = 0.4  # of the device's free memory that the training images may take; the copy that pads them takes as much again


def holdout_positions(labels: Labels) -> Labels:
    """Positions of the held-out tenth of a training set: of each class the same share, rounded half up, the same for every run."""
    return stratified(labels, 1, HOLDOUT_PART)


def trained_positions(labels: Labels, split: str) -> Labels:
    """Positions of the images that a run of this split trains on."""
    positions = np.arange(len(labels))
    return np.setdiff1d(positions, holdout_positions(labels)) if split == "holdout" else positions


@dataclass(frozen=True)
class Normalisation:
    """(pixel/255 - mean) / std, a channel at a time; mean and std are those of the images trained on, in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: Tensor) -> Normalisation:
        """Statistics of uint8 images [N, H, W, C]."""
        counts = torch.stack([torch.bincount(images[..., c].flatten(), minlength=256) for c in range(images.shape[-1])]).double()
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = counts @ values / counts.sum(1)
        variance = counts @ values.square() / counts.sum(1) - mean.square()
        std = variance.where(variance > 1e-12, 1.0).sqrt()  # a channel of one value is centred and left at that
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def on(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The function uint8 or float32 [N, H, W, C] -> float32 [N, C, H, W] in channels_last memory, its constants on the device."""
        scale = torch.tensor([1 / (255 * s) for s in self.std], device=device)
        shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)], device=device)
        return lambda images: images.to(torch.float32, copy=True).mul_(scale).add_(shift).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Labelled:
    """Images uint8 [N, H, W, C] and labels [N] to measure accuracy on, on the device."""

    images: Tensor
    labels: Tensor


class DeviceData:
    """One data set under one split, on the device: shared by all streams of a cohort.

    Attributes:
        padded: uint8 [n, H+2p, W+2p, C] training images; in the host's memory where they are too many for the device.
        resident: whether the device holds them.
        labels: [n] their labels, ``NO_LABEL`` for those that have none.
        labelled: how many have one: these come first.
        test: the test images.
        curve: what every epoch is measured on: ``test`` of a full run, the held-out tenth of a holdout run.
        normalisation, normalise: from the labelled images trained on.
    """

    def __init__(self, data: ImageData, split: str, device: torch.device) -> None:
        self.spec, self.crop, self.pad, self.flip, self.device = data.spec, data.crop, data.pad, data.flip, device
        trained = trained_positions(data.y_train, split)
        held_out = np.setdiff1d(np.arange(len(data.y_train)), trained)
        images, labels = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
        shown, known = images[trained], labels[trained]
        self.labelled = len(trained)
        self.normalisation = Normalisation.of(shown)
        self.normalise = self.normalisation.on(device)
        if data.unlabelled is not None:
            shown = torch.cat([shown, torch.from_numpy(data.unlabelled.images)])
            known = torch.cat([known, torch.full((len(shown) - len(known),), NO_LABEL)])
        sides = (data.spec.height + 2 * data.pad) * (data.spec.width + 2 * data.pad)
        self.resident = len(shown) * sides * data.spec.channels <= RESIDENT_SHARE * free_memory(device)
        self.padded = reflect_pad(shown.to(device if self.resident else "cpu"), data.pad)
        self.labels = known.to(device)
        self.test = Labelled(torch.from_numpy(data.x_test).to(device), torch.from_numpy(data.y_test).to(device))
        self.curve = Labelled(images[held_out].to(device), labels[held_out].to(device)) if split == "holdout" else self.test
        if not len(self.curve.labels):
            raise UserError(f"--holdout: a tenth of each class of {data.name} is no image; give it at least 5 images a class")


class Stream:
    """The batches of one seed: every student of that seed sees the same images in the same order, cropped and mixed alike."""

    def __init__(self, data: DeviceData, seed: int, batch_size: int, *, mixup: float = False) -> None:
        self.data, self.seed, self.batch_size, self.mixup = data, seed, batch_size, mixup
        self.steps = len(data.labels) // batch_size  # the last partial batch is dropped
        if self.steps == 0:
            raise UserError(f"train.batch_size={batch_size} is more than the {len(data.labels)} training images; set --batch-size lower")

    def draws(self, epoch: int) -> Draws:
        """All that is random in an epoch, on the device."""
        data, n = self.data, len(self.data.labels)
        draws = draw_epoch(n, pad=data.pad, flip=data.flip, seed=self.seed, epoch=epoch, device=data.device)
        if data.crop == "resized":
            size = (data.spec.height, data.spec.width)
            draws = replace(draws, boxes=draw_boxes(n, size, seed=self.seed, epoch=epoch, device=data.device))
        if self.mixup:
            draws = replace(draws, shares=draw_shares(n, self.mixup, seed=self.seed, epoch=epoch, device=data.device))
        return draws

    def shown(self, step: int) -> slice:
        """The places of a step's images in the epoch's order."""
        return slice(step * self.batch_size, (step + 1) * self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Batch]]:
        """The epoch's batches: images float32 [B, C, H, W] and what the step knows beside them."""
        draws, number = self.draws(epoch), torch.tensor(epoch, device=self.data.device)
        if self.data.resident:
            for step in range(self.steps):
                yield self.batch(draws, self.shown(step), number)
            return
        for step, padded in enumerate(self._fetched(draws)):
            yield self.batch(draws, self.shown(step), number, padded)

    def batch(self, draws: Draws, shown: slice | Tensor, epoch: Tensor, padded: Tensor | None = None) -> tuple[Tensor, Batch]:
        """The batch at the places ``shown`` of an epoch that was drawn; ``padded`` holds its images where the device does not hold all."""
        indices = draws.order[shown]
        places = indices if padded is None else torch.arange(len(indices), device=indices.device)
        source = self.data.padded if padded is None else padded
        if draws.boxes is None:
            size = (self.data.spec.height, self.data.spec.width)
            images = crop_and_flip(source, places, draws.rows[shown], draws.columns[shown], draws.flips[shown], size)
        else:
            images = resize_and_flip(source[places], draws.boxes[shown], draws.flips[shown])
        if draws.shares is None:
            return self.data.normalise(images), self._known(indices, epoch)
        share = draws.shares[shown][:1]
        return self.data.normalise(mix(images, share)), self._known(indices, epoch, share)

    def _known(self, indices: Tensor, epoch: Tensor, share: Tensor | None = None) -> Batch:
        """What a step knows: the labels where each image has one of its own, else what the task is computed with, if it has any."""
        if self.mixup is True:
            return Batch(None, indices, epoch)
        labels = self.data.labels[indices]
        if share is None and self.data.labelled == len(self.data.labels):
            return Batch(labels, indices, epoch)
        counted = (labels != NO_LABEL).sum().clamp(min=1)
        return Batch(None, indices, epoch, targets=Targets(labels, counted, None if share is None else partners(labels), share))

    def _fetched(self, draws: Draws) -> Iterator[Tensor]:
        """Each step's padded images from the host, copied to the device while the step before is computed."""
        order, device = draws.order.cpu(), self.data.device
        copying = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

        def fetch(step: int) -> Tensor:
            part = self.data.padded[order[self.shown(step)]]
            if copying is None:
                return part.to(device)
            with torch.cuda.stream(copying):
                return part.pin_memory().to(device, non_blocking=True)

        ahead = fetch(0)
        for step in range(self.steps):
            if copying is not None:
                torch.cuda.current_stream(device).wait_stream(copying)
                ahead.record_stream(torch.cuda.current_stream(device))
            ready = ahead
            if step + 1 < self.steps:
                ahead = fetch(step + 1)
            yield ready
