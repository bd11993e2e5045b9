"""Loaders given from Python, as a data set whose name tells what they hold.

Their batches are taken as they come: a loader decides order, augmentation and normalisation. What it draws from the generators of torch,
numpy and Python is made a function of (seed, epoch).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Subset

from .. import advice
from ..checks import UserError, summary
from ..config import LOADER
from ..randomness import derive, generator
from ..types import NO_LABEL, DataSpec
from .dataset import ImageData, digest
from .names import in_order, names_below, refuse_other_names

TRAIN, VAL = "train_loader", "val_loader"
EVERY_PASS = "give the same images on every pass"
IN_MEMORY: dict[str, UserLoaderData] = {}


class Python:
    """Python's own generator, with the methods of the others."""

    get_state, set_state = staticmethod(random.getstate), staticmethod(random.setstate)


@dataclass(frozen=True, kw_only=True)
class UserLoaderData(ImageData):
    """Two loaders as a data set; its arrays are empty.

    Attributes:
        train, val: the loaders.
        size: (C, H, W) of an image.
        counts: numbers of images to train on and to measure on.
        batch_size: images in the first batch.
        known_hash: the hash that ``adopt`` computes of them.
    """

    train: Any
    val: Any
    size: tuple[int, int, int]
    counts: tuple[int, int]
    batch_size: int
    known_hash: str

    @property
    def spec(self) -> DataSpec:
        """The sizes."""
        return DataSpec(self.name, self.counts[0], self.classes, *self.size)

    @cached_property
    def hash(self) -> str:
        """See ``adopt``."""
        return self.known_hash


def adopt(train: Any, val: Any, classes: int | None = None) -> UserLoaderData:
    """Make a data set of two loaders: it reads all of ``val`` and the first batch of ``train``.

    Its hash covers the first batch of both, as seed 0 draws it, all labels of ``val``, the numbers of images and batches, what the data
    sets and their transforms print of themselves, and the indices, ``targets`` and ``tensors`` that they hold. It does not cover the pixels
    of all images.

    Args:
        train, val: iterables with a length that give (images float [B, C, H, W], labels integer [B]).
        classes: number of classes. Default: as many as a data set has names for (``classes``), or else the largest label of ``val`` and
            one more.

    Raises:
        UserError: a loader gives something else or nothing, or the two give classes different names.
    """
    steps, _ = _steps(train, TRAIN), _steps(val, VAL)
    first, first_labels = checked(next(drawn(train, 0, TRAIN, 0), None), TRAIN)
    finite = Finite(TRAIN)
    finite.look(first)
    finite.end()
    size = _size(first)
    shown, labels = _measured_on(val, size)
    sets = [(source, getattr(loader, "dataset", None)) for source, loader in ((TRAIN, train), (VAL, val))]
    refuse_other_names([(source, names) for source, dataset in sets for names in names_below(dataset)])
    names = next((names for _, dataset in sets if (names := in_order(dataset))), ())
    count = classes or len(names) or int(labels.max()) + 1
    for known in (first_labels, labels):
        refuse_other_labels(known, count)
    n_train = len(train.dataset) if hasattr(getattr(train, "dataset", None), "__len__") else steps * len(first)
    numbers = np.array([n_train, len(labels), steps, len(first), count])
    described = np.frombuffer(f"{_described(train)}\n{_described(val)}".encode(), np.uint8)
    begins = first.float().cpu().numpy(), first_labels.cpu().numpy()
    known_hash = digest(labels.numpy(), shown, *begins, numbers, described, *_held(train), *_held(val))
    _, height, width = size
    nothing = np.empty((0, height, width, size[0]), np.uint8)
    data = UserLoaderData(
        name=f"{LOADER}:{known_hash[:8]}",
        x_train=nothing,
        y_train=np.full(n_train, NO_LABEL),
        x_test=nothing,
        y_test=np.empty(0, np.int64),
        classes=count,
        pad=0,
        flip=False,
        class_names=names if len(names) == count else (),
        train=train,
        val=val,
        size=size,
        counts=(n_train, len(labels)),
        batch_size=len(first),
        known_hash=known_hash,
    )
    IN_MEMORY[data.name] = data
    return data


def _measured_on(val: Any, size: tuple[int, int, int]) -> tuple[npt.NDArray[np.float32], Tensor]:
    """The first batch of images of ``val``, and all its labels."""
    shown: npt.NDArray[np.float32] = np.empty(0, np.float32)
    parts: list[Tensor] = []
    finite = Finite(VAL)
    for images, labels in (checked(batch, VAL) for batch in drawn(val, 0, VAL, 0)):
        refuse_other_sizes(images, size)
        finite.look(images)
        shown = shown if parts else images.float().cpu().numpy()
        parts.append(labels.cpu())
    finite.end()
    if not parts:
        raise UserError(f"{VAL}: it gives no batch, though it has a length of {len(val)}; accuracy is measured on its images")
    return shown, torch.cat(parts)


def recall(name: str) -> UserLoaderData:
    """The data set of loaders that were given from Python in this process.

    Raises:
        UserError: they were given in another process.
    """
    if name not in IN_MEMORY:
        raise UserError(f"{name} was given from Python, and is in no file; {advice.from_python()}")
    return IN_MEMORY[name]


def _steps(loader: Any, source: str) -> int:
    if isinstance(loader, Iterator):
        raise UserError(f"{source}: {type(loader).__name__} is an iterator, gone through once; a loader must {EVERY_PASS}")
    try:
        count = len(loader)
    except Exception as error:  # a data set that is a stream, or anyone's code
        raise UserError(f"{source}: its number of batches is not known ({summary(error)}); give it a length") from None
    if not count:
        raise UserError(f"{source}: it has no batch; with drop_last its images may be fewer than batch_size")
    return count


def smallest(loader: Any, batch_size: int) -> int:
    """Images in a loader's smallest batch: of a list, its smallest; of a DataLoader, its last one, ``batch_size`` being that of the first.

    For another loader, or a DataLoader with a user's own batch sampler, nobody knows before it is drawn; it is ``batch_size``.
    """
    if type(loader) in (list, tuple):
        return min(len(checked(batch, TRAIN)[1]) for batch in loader)
    if not isinstance(loader, DataLoader) or type(loader.batch_sampler) is not BatchSampler or loader.drop_last:
        return batch_size
    try:
        return len(loader.sampler) % batch_size or batch_size  # type: ignore[arg-type]
    except TypeError:  # it has no length
        return batch_size


def drawn(loader: Any, seed: int, purpose: str, epoch: int) -> Iterator[Any]:
    """Yield a loader's batches. It draws from seeded generators; between two batches they are as they were before."""
    owners = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    generators = [held for owner in owners if isinstance(held := getattr(owner, "generator", None), torch.Generator)]
    lent = dict.fromkeys([torch.default_generator, *generators])
    states: dict[Any, Any] = {rng: generator(seed, f"{purpose} {index}", epoch).get_state() for index, rng in enumerate(lent)}
    derived_seed = derive(seed, purpose, epoch)
    states |= {np.random: np.random.RandomState(derived_seed % 2**32).get_state(), Python: random.Random(derived_seed).getstate()}
    with _lending(states):
        batches = iter(loader)
    end = object()
    while True:
        with _lending(states):
            batch = next(batches, end)
        if batch is end:
            return
        yield batch


@contextmanager
def _lending(states: dict[Any, Any]) -> Iterator[None]:
    before = {rng: rng.get_state() for rng in states}
    for rng, state in states.items():
        rng.set_state(state)
    try:
        yield
    finally:
        for rng, state in before.items():
            states[rng] = rng.get_state()
            rng.set_state(state)


def checked(batch: Any, source: str) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch. Labels of any integer type become int64.

    Raises:
        UserError: the batch is something else.
    """
    wanted = "it must give (images float [B, C, H, W], labels integer [B])"
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        kinds = ", ".join(type(part).__name__ for part in batch) if isinstance(batch, tuple | list) else type(batch).__name__
        raise UserError(f"{source}: it gives ({kinds}); {wanted}")
    images, labels = batch
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    fits = images.dim() == 4 and images.is_floating_point() and labels.dim() == 1 and integer
    if not fits or len(images) != len(labels) or not len(labels):
        kinds = ", ".join(f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}" for part in batch)
        raise UserError(f"{source}: it gives ({kinds}); {wanted}")
    return images, labels.long()


def refuse_other_sizes(images: Tensor, size: tuple[int, int, int]) -> None:
    """Refuse images of another size than the first.

    Raises:
        UserError: they have another size.
    """
    if _size(images) != size:
        first, other = ("x".join(map(str, sides)) for sides in (size, _size(images)))
        raise UserError(f"the loaders give images of {first} and of {other}; give all one size")


def refuse_other_labels(
    labels: Tensor, classes: int, *, least: int = 0, what: str = "the loaders give", other: str = "give classes="
) -> None:
    """Refuse labels below ``least`` or beyond the classes. Labels on a device are not looked at: that would wait for it.

    Raises:
        UserError: there is such a label; the message has the first.
    """
    if labels.device.type == "cpu" and len(wrong := labels[(labels < least) | (labels >= classes)]):
        raise UserError(f"{what} label {int(wrong[0])}, of {classes} classes; labels are 0 to {classes - 1}, or {other}")


class Finite:
    """Checks that the images of one pass through a loader are finite.

    Images in the host's memory are checked as they come, those on a device after the last batch, so that nothing waits for the device.
    """

    def __init__(self, source: str, epoch: int | None = None) -> None:
        self.source, self.when = source, "" if epoch is None else f" in epoch {epoch + 1}"
        self._batches = 0
        self._later: list[tuple[str, Tensor]] = []

    def look(self, images: Tensor) -> None:
        """Check the next batch.

        Raises:
            UserError: an image holds a value that is not finite.
        """
        self._batches += 1
        which, here = f"of {len(images)} images of batch {self._batches}{self.when}", images.device.type == "cpu"
        if here and images.sum().isfinite():  # by far the cheapest look; it may overflow, and then each value counts
            return
        broken = (~images.isfinite().flatten(1).all(1)).sum()
        if not here:
            self._later.append((which, broken))
        else:
            self._refuse(int(broken), which)

    def end(self) -> None:
        """Check the batches on a device, after the last one; this waits for the device.

        Raises:
            UserError: as ``look``.
        """
        if self._later:
            counts = torch.stack([broken for _, broken in self._later]).tolist()
            for (which, _), broken in zip(self._later, counts, strict=True):
                self._refuse(broken, which)

    def _refuse(self, broken: int, which: str) -> None:
        if broken:
            raise UserError(f"{self.source}: {broken} {which} hold values that are not finite; mend them, or leave them out")


def _size(images: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = images.shape
    return channels, height, width


def _dataset(loader: Any) -> Any:
    """The data set of a loader, below its subsets."""
    dataset: Any = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def _held(loader: Any) -> Iterator[npt.NDArray[Any]]:
    """Yield the numbers that a loader's data set holds: indices of a subset, labels, tensors."""
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        yield np.asarray(dataset.indices)
        dataset = dataset.dataset
    for part in (*getattr(dataset, "tensors", ()), getattr(dataset, "targets", ())):
        numbers = part.detach().cpu().reshape(-1).view(torch.uint8).numpy() if isinstance(part, Tensor) else np.asarray(part)
        if numbers.dtype.kind in "biuf":
            yield numbers


def _described(loader: Any) -> str:
    """What a loader's data set and its transform print, without addresses in memory."""
    dataset = _dataset(loader)
    printed = f"{type(loader).__name__} {dataset!r} {getattr(dataset, 'transform', None)!r}"
    return re.sub(r" at 0x[0-9a-f]+", "", printed)
