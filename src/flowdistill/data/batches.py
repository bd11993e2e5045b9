"""From a data set to normalised batches: the split, the tensors on the device, and one stream of batches per seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import UserError, some
from ..config import ClassWeights, TrainConfig
from ..device import free_memory
from ..ranks import current
from ..types import NO_LABEL, Batch, Targets
from .augment import (
    Draws,
    crop_and_flip,
    cut_and_mix,
    draw_boxes,
    draw_epoch,
    draw_erased,
    draw_pasted,
    draw_shares,
    draw_switches,
    erase,
    kept,
    mix,
    partners,
    reflect_pad,
    resize_and_flip,
)
from .balance import draw_balanced, weighted, weights_of
from .dataset import ImageData, Images, Labels, Pictures, part
from .interfaces import EvalSet, at_once
from .lazy_images import Rows
from .normalisation import Normalisation
from .splits import trained_positions
from .streaming import Decoder, Shot, StreamedSet, Workers
from .user_batches import UserLoaderSupply
from .user_loaders import UserLoaderData

RESIDENT_SHARE = 0.4  # of the device's free memory that the training images may take; the copy that pads them takes as much again


@dataclass(frozen=True)
class ResidentSet:
    """Images uint8 [N, H, W, C] and their labels [N]. The labels are on the device; the images may be in the host's memory."""

    images: Tensor
    labels: Tensor
    normalise: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``EvalSet`` says."""
        size = at_once(self.images.shape[1], self.images.shape[2], self.labels.device)
        for start in range(0, len(self.images), size)[first::every]:
            images = self.images[start : start + size].to(self.labels.device)
            yield self.normalise(images), self.labels[start : start + size]


def eval_set(
    images: Images | Pictures,
    labels: Labels,
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    workers: int | None = None,
    replaced: set[str] | None = None,
) -> EvalSet:
    """Images to measure networks on; ``replaced`` gets the names of those that could not be decoded."""
    numbers = torch.from_numpy(labels).to(device)
    if isinstance(images, Pictures):
        decoding = Workers(Decoder(images), device, workers, set() if replaced is None else replaced)
        return StreamedSet(images, numbers, normalise, decoding)
    return ResidentSet(torch.from_numpy(images).to(device), numbers, normalise)


class Copies:
    """Batches of padded images from the host, each copied to the device while the step before is computed."""

    def __init__(self, padded: Tensor, device: torch.device) -> None:
        self.padded, self.device = padded, device

    def batches(self, parts: Sequence[Tensor], times: Sequence[Tensor], epoch: int) -> Iterator[Tensor]:  # noqa: ARG002 (the same in all)
        """Yield the images at each part's indices, uint8 [B, H+2p, W+2p, C] on the device."""
        device = self.device
        copying = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

        def fetch(step: int) -> Tensor:
            part = self.padded[parts[step]]
            if copying is None:
                return part.to(device)
            with torch.cuda.stream(copying):
                return part.pin_memory().to(device, non_blocking=True)

        ahead = fetch(0)
        for step in range(len(parts)):
            if copying is not None:
                torch.cuda.current_stream(device).wait_stream(copying)
                ahead.record_stream(torch.cuda.current_stream(device))
            ready = ahead
            if step + 1 < len(parts):
                ahead = fetch(step + 1)
            yield ready

    def close(self) -> None:
        """Nothing is kept."""


class Decoding:
    """Batches of images that processes decode, padded on the device."""

    def __init__(self, workers: Workers, pad: int) -> None:
        self.workers, self.pad, self.close = workers, pad, workers.close

    def batches(self, parts: Sequence[Tensor], times: Sequence[Tensor], epoch: int) -> Iterator[Tensor]:
        """Yield batches as ``Copies`` does. An image that was drawn before in this epoch, ``times`` times, is augmented anew."""
        shots = zip((part.tolist() for part in parts), (part.tolist() for part in times), strict=True)
        for images in self.workers.batches([[Shot(epoch, *shot) for shot in zip(*one, strict=True)] for one in shots]):
            yield reflect_pad(images, self.pad) if self.pad else images


class DeviceData:
    """One data set under one split, on the device: shared by all seed batches of a cohort.

    Attributes:
        padded: uint8 [n, H+2p, W+2p, C] training images; in the host's memory if the device has no room for them.
        resident: whether the device holds them.
        labels: [n] their labels, ``NO_LABEL`` for those that have none.
        num_labelled: how many have a label; these come first. Without any there is no task, and there are no images to measure on.
        train_eval: the labelled training images, neither padded nor cropped.
        test: the test images.
        epoch_images: the images that every epoch is measured on: ``test`` of a full run, the held-out tenth of a holdout run.
        normalisation, normalise: measured on the labelled images trained on.
    """

    padded: Tensor

    def __init__(self, data: ImageData, split: str, device: torch.device, workers: int | None = None) -> None:
        self.spec, self.crop, self.pad, self.flip, self.device = data.spec, data.crop, data.pad, data.flip, device
        self.workers, self.replaced = workers, set[str]()
        train_positions = trained_positions(data.y_train, split)
        held_out = np.setdiff1d(np.arange(len(data.y_train)), train_positions)
        images, labels = part(data.x_train, train_positions), data.y_train[train_positions]
        self.num_labelled = len(train_positions) if data.classes else 0
        self.normalisation = Normalisation.measured(images, labels)
        self.normalise = self.normalisation.on(device)
        if data.unlabelled is not None:
            assert not isinstance(images, Pictures)
            images = np.concatenate([images, data.unlabelled.images])
            labels = np.concatenate([labels, np.full(len(data.unlabelled.images), NO_LABEL)])
        self.labels = torch.from_numpy(labels).to(device)
        self.train_eval = self._take_up(data, images)
        self.test = self._eval_set(data.x_test, data.y_test)
        self.epoch_images: EvalSet = (
            self._eval_set(part(data.x_train, held_out), data.y_train[held_out]) if split == "holdout" else self.test
        )
        if split == "holdout" and not len(self.epoch_images):
            raise UserError(f"--holdout: a tenth of each class of {data.name} is no image; give it at least 5 images a class")

    def _eval_set(self, images: Images | Pictures, labels: Labels) -> EvalSet:
        return eval_set(images, labels, self.normalise, self.device, self.workers, self.replaced)

    def _take_up(self, data: ImageData, images: Images | Pictures) -> EvalSet:
        """Hold the training images."""
        assert not isinstance(images, Pictures)
        height, width, channels = data.spec.height, data.spec.width, data.spec.channels
        sides = (height + 2 * data.pad) * (width + 2 * data.pad)
        self.resident = len(images) * sides * channels <= RESIDENT_SHARE * free_memory(self.device)
        self.padded = reflect_pad(torch.from_numpy(images).to(self.device if self.resident else "cpu"), data.pad)
        inner = self.padded[:, data.pad : data.pad + height, data.pad : data.pad + width]
        return ResidentSet(inner[: self.num_labelled], self.labels[: self.num_labelled], self.normalise)

    def fetch(self, seed: int) -> Copies | Decoding:  # noqa: ARG002 (StreamedData needs it)
        """The object that brings a seed's batches to a device that does not hold all images."""
        return Copies(self.padded, self.device)

    def seed_batches(self, seed: int, train: TrainConfig) -> SeedBatches:
        """The batches of one seed."""
        return SeedBatches(
            self,
            seed,
            train.batch_size,
            mixup=train.mixup,
            cutmix=train.cutmix,
            random_erasing=train.random_erasing,
            balanced=train.sampling == "balanced",
            class_weights=train.class_weights,
        )

    def remarks(self) -> list[str]:
        """As ``Supply`` says."""
        names = sorted(self.replaced)
        line = f"{len(names):,} images could not be decoded, and others of their classes took their places: {some(names)}"
        return [line] if names else []


class StreamedData(DeviceData):
    """One data set whose training images are decoded batch by batch: memory does not hold them, or RandAugment changes them first."""

    resident = False

    def _take_up(self, data: ImageData, images: Images | Pictures) -> EvalSet:
        if not isinstance(images, Pictures):
            rows = np.arange(len(images))
            sides = (self.spec.height, self.spec.width, self.spec.channels)
            images = Pictures(data.name, Rows(images), rows, self.labels.cpu().numpy(), sides)
        self.pictures, self.resized, self.randaugment = images, data.crop == "resized", data.randaugment
        self.crop = "shift"  # processes cut boxes out before a batch gets here, and then there is no border to shift in
        train_positions = np.arange(self.num_labelled)
        return self._eval_set(images.part(train_positions), images.labels[train_positions])

    def fetch(self, seed: int) -> Decoding:
        """Make processes that decode for this seed alone."""
        decoder = Decoder(self.pictures, seed, self.resized, self.randaugment)
        return Decoding(Workers(decoder, self.device, self.workers, self.replaced), self.pad)


def to_device(data: ImageData, split: str, device: torch.device, workers: int | None = None) -> DeviceData | UserLoaderSupply:
    """The data under a split, on the device if it has room for them.

    ``workers``: processes that decode streamed images; 0 decodes in this process. Default: one per core, at most eight.
    """
    if isinstance(data, UserLoaderData):
        return UserLoaderSupply(data, device)
    return (StreamedData if data.streamed or data.randaugment is not None else DeviceData)(data, split, device, workers)


class SeedBatches:
    """The batches of one seed: every student of that seed sees the same images in the same order, cropped and mixed alike.

    Ranks share each batch out, and this gives a rank's part of it. An epoch's draws are the same on all of them.

    Args:
        mixup, cutmix, random_erasing, class_weights: as in ``TrainConfig``.
        balanced: whether an epoch shows as many images of each class.
    """

    def __init__(
        self,
        data: DeviceData,
        seed: int,
        batch_size: int,
        *,
        mixup: float = False,
        cutmix: float = 0.0,
        random_erasing: float = 0.0,
        balanced: bool = False,
        class_weights: ClassWeights = "none",
    ) -> None:
        self.data, self.seed, self.batch_size, self.ranks = data, seed, batch_size, current()
        self.mixup, self.cutmix, self.random_erasing, self.class_weights = mixup, cutmix, random_erasing, class_weights
        self.mixed = bool(mixup or cutmix)
        labels = data.labels[: data.num_labelled]
        self.weights = weights_of(class_weights, labels, data.spec.classes)
        self.by_class = torch.split(labels.argsort(stable=True).cpu(), labels.bincount().tolist()) if balanced else None
        self._mean_colour = torch.tensor(data.normalisation.mean, dtype=torch.float32, device=data.device) * 255
        self._fetch = None if data.resident else data.fetch(seed)
        self.steps, self.smallest_batch = len(data.labels) // batch_size, batch_size  # the last partial batch is dropped
        if self.steps == 0:
            raise UserError(f"train.batch_size={batch_size} is more than the {len(data.labels)} training images; set --batch-size lower")

    def with_labels(self) -> SeedBatches:
        """As ``Batches`` says."""
        if self.mixup is not True:
            return self
        balanced = self.by_class is not None
        return SeedBatches(self.data, self.seed, self.batch_size, random_erasing=self.random_erasing, balanced=balanced)

    @property
    def kind(self) -> object:
        """What batches must have in common for one compiled function to make them."""
        return self.data, self.batch_size, self.mixup, self.cutmix, self.random_erasing, self.class_weights

    def close(self) -> None:
        """End the processes that decode; the next epoch starts them anew."""
        if self._fetch is not None:
            self._fetch.close()

    def draws(self, epoch: int) -> Draws:
        """All that is random in an epoch, on the device."""
        data, n = self.data, len(self.data.labels)
        draws = draw_epoch(n, pad=data.pad, flip=data.flip, seed=self.seed, epoch=epoch, device=data.device)
        size = (data.spec.height, data.spec.width)
        where: dict[str, Any] = {"seed": self.seed, "epoch": epoch, "device": data.device}
        if self.by_class is not None:
            order, times = draw_balanced(self.by_class, n, seed=self.seed, epoch=epoch)
            draws = replace(draws, order=order.to(data.device), times=times.to(data.device))
        if data.crop == "resized":
            draws = replace(draws, boxes=draw_boxes(n, size, **where))
        if self.random_erasing:
            draws = replace(draws, erased=draw_erased(n, size, self.random_erasing, **where))
        if self.mixup:
            draws = replace(draws, shares=draw_shares(n, self.mixup, **where))
        if self.cutmix:
            pasted = draw_pasted(n, size, self.cutmix, **where)
            shares = kept(pasted, size)
            if draws.shares is not None:
                cut = draw_switches(n, **where)
                pasted, shares = pasted.where(cut[:, None], 0), shares.where(cut, draws.shares)
            draws = replace(draws, shares=shares, pasted=pasted)
        return draws

    @property
    def _made_whole(self) -> bool:
        """Whether the whole batch is made before a rank takes its part: an image's partner or a label to count may be in another's."""
        return self.ranks.several and (self.mixed or self.weights is not None or 0 < self.data.num_labelled < len(self.data.labels))

    def shown(self, step: int) -> slice:
        """The positions in the epoch's order of a step's images, as far as they are made here."""
        start = step * self.batch_size
        return slice(start, start + self.batch_size) if self._made_whole else self.ranks.own(start, self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Batch]]:
        """Yield the epoch's batches: images float32 [B, C, H, W], and their ``Batch``."""
        draws, number = self.draws(epoch), torch.tensor(epoch, device=self.data.device)
        if self._fetch is None:
            for step in range(self.steps):
                yield self.batch(draws, self.shown(step), number)
            return
        order = draws.order.cpu()
        all_times = torch.zeros_like(order) if draws.times is None else draws.times.cpu()
        parts, times = ([values[self.shown(step)] for step in range(self.steps)] for values in (order, all_times))
        for step, padded in enumerate(self._fetch.batches(parts, times, epoch)):
            yield self.batch(draws, self.shown(step), number, padded)

    def batch(self, draws: Draws, shown: slice | Tensor, epoch: Tensor, padded: Tensor | None = None) -> tuple[Tensor, Batch]:
        """The batch at the positions ``shown`` of a drawn epoch. ``padded`` holds its images if the device does not hold all."""
        images, batch = self._made(draws, shown, epoch, padded)
        return self._own(images, batch) if self._made_whole else (images, batch)

    def _own(self, images: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
        """A rank's part of a whole batch. Its share of the count lets the mean over the ranks be the whole batch's."""
        own, targets = self.ranks.own(0, self.batch_size), batch.targets
        if targets is not None:
            mixed_in = None if targets.partners is None else targets.partners[own]
            targets = targets._replace(labels=targets.labels[own], counted=targets.counted / self.ranks.world, partners=mixed_in)
        assert batch.indices is not None
        labels = None if batch.labels is None else batch.labels[own]
        return images[own], Batch(labels, batch.indices[own], batch.epoch, targets=targets)

    def _made(self, draws: Draws, shown: slice | Tensor, epoch: Tensor, padded: Tensor | None) -> tuple[Tensor, Batch]:
        indices = draws.order[shown]
        positions = indices if padded is None else torch.arange(len(indices), device=indices.device)
        source = self.data.padded if padded is None else padded
        if draws.boxes is None:
            size = (self.data.spec.height, self.data.spec.width)
            images = crop_and_flip(source, positions, draws.rows[shown], draws.columns[shown], draws.flips[shown], size)
        else:
            images = resize_and_flip(source[positions], draws.boxes[shown], draws.flips[shown])
        if draws.erased is not None:
            images = erase(images, draws.erased[shown], self._mean_colour)
        if draws.shares is None:
            return self.data.normalise(images), self._known(indices, epoch)
        share = draws.shares[shown][:1]
        images = mix(images, share) if draws.pasted is None else cut_and_mix(images, share, draws.pasted[shown][:1])
        return self.data.normalise(images), self._known(indices, epoch, share)

    def _known(self, indices: Tensor, epoch: Tensor, share: Tensor | None = None) -> Batch:
        """What a step knows of its images: their labels if each has one and is not mixed, else the task's targets, if there is a task."""
        if self.mixup is True or not self.data.num_labelled:
            return Batch(None, indices, epoch)
        labels = self.data.labels[indices]
        known = labels if share is None and self.data.num_labelled == len(self.data.labels) else None
        if share is None and self.weights is not None:
            return Batch(known, indices, epoch, targets=weighted(labels, self.weights))
        if known is not None:
            return Batch(known, indices, epoch)
        counted = (labels != NO_LABEL).sum().clamp(min=1)
        mixed_in = None if share is None else partners(labels)
        return Batch(None, indices, epoch, targets=Targets(labels, counted, mixed_in, share, self.weights))
