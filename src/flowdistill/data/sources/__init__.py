"""Data sets by name: ``digits``, ``cifar10``, ``cifar100``, ``fashion_mnist``; by scheme: ``npz:``, ``folder:``, ``csv:``, ``hf:``.

A source is a file here that registers what reads it, and for a scheme a row in ``config.SCHEMES``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

import numpy as np

from ...checks import UserError, did_you_mean
from ...config import DataConfig, scheme_of, written_schemes
from ...talk import Remarks, unheard
from ...types import NO_LABEL
from ..dataset import ImageData, Unlabelled, part
from ..splits import stratified
from .base import READERS, SOURCES, UNLABELLED_READERS, Source
from .npz import read_npz

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["READERS", "SOURCES", "UNLABELLED_READERS", "Source", "held", "load", "load_unlabelled", "read_npz"]

_held: dict[DataConfig, ImageData] = {}


@contextmanager
def held(data: Mapping[DataConfig, ImageData]) -> Iterator[None]:
    """Inside, these data are taken as they are, unlabelled images included: another process read them, and sent them here."""
    _held.update(data)
    try:
        yield
    finally:
        for config in data:
            del _held[config]


def load(config: DataConfig, remarks: Remarks | None = None) -> ImageData:
    """The data that a config names, with its own crop, padding, flip and number of training images where the config says so.

    ``remarks`` are told what of the files is left out; left out itself, nobody hears of it.

    Raises:
        UserError: unknown name, file missing or not valid, no network; in one line.
    """
    if config in _held:
        return _held[config]
    if (scheme := scheme_of(config.name)) is not None:
        data = READERS[scheme.name](config, remarks or unheard())
        if scheme.from_python:
            return data
    elif config.no_labels:
        data = _without_labels(config, remarks)
    elif config.name in SOURCES:
        data = SOURCES[config.name].read(config.root.expanduser())
    else:
        known = [*SOURCES, *written_schemes()]
        raise UserError(f"unknown data set {config.name!r}: {did_you_mean(config.name, known)}{SOURCES.causes}")
    crop = config.crop or ("resized" if data.streamed and config.pad is None else "shift")
    pad = 0 if crop == "resized" else data.pad if config.pad is None else config.pad
    smallest = min(data.spec.height, data.spec.width)
    if pad >= smallest:
        raise UserError(f"data.pad={pad}: reflection needs less than the image's {smallest} pixels; set data.pad lower")
    if config.randaugment is not None and data.spec.channels not in (1, 3):
        raise UserError(
            f"data.randaugment={config.randaugment}: its operations are on grey or RGB images, not on {data.spec.channels} channels"
        )
    flip = data.flip if config.flip is None else config.flip
    data = replace(data, pad=pad, flip=flip, crop=crop, randaugment=config.randaugment)
    return data if config.limit_train is None else _limited(data, config.limit_train)


def _without_labels(config: DataConfig, remarks: Remarks | None) -> ImageData:
    """The images of ``data.unlabelled`` as a data set of its own: no labels, no classes, no test images."""
    source = str(config.unlabelled)
    scheme = scheme_of(source)
    assert scheme is not None, "the config was validated"
    found = UNLABELLED_READERS[scheme.name](config.model_copy(update={"name": source}), remarks or unheard())
    none = np.zeros(0, np.int64)
    return ImageData(found.name, found.images, np.full(len(found.images), NO_LABEL), found.images[:0], none, classes=0)


def load_unlabelled(config: DataConfig, beside: ImageData, remarks: Remarks | None = None) -> Unlabelled:
    """The images of ``data.unlabelled``. Files are made grey or RGB as the labelled ones are and, where those are square, resized to them.

    Raises:
        UserError: they are missing or not valid, have other sizes than the labelled ones, or those are streamed; in one line.
    """
    source, like = str(config.unlabelled), beside.spec
    if beside.streamed:
        raise UserError(
            f"data.unlabelled={source}: unlabelled images are held in memory beside the labelled ones, but {config.name} is streamed; "
            f"leave data.stream out or set data.size lower, so that it is held, or leave unlabelled out"
        )
    scheme = scheme_of(source)
    assert scheme is not None, "the config was validated"
    size = like.height if like.height == like.width else None
    as_labelled = config.model_copy(update={"name": source, "size": size, "channels": like.channels})
    unlabelled = UNLABELLED_READERS[scheme.name](as_labelled, remarks or unheard())
    if unlabelled.images.shape[1:] != (like.height, like.width, like.channels):
        theirs, ours = ("x".join(map(str, shape)) for shape in (unlabelled.images.shape[1:], (like.height, like.width, like.channels)))
        raise UserError(f"{source}: its images are {theirs}, those of {like.name} {ours}; give images of that size")
    return unlabelled


def _limited(data: ImageData, images: int) -> ImageData:
    """About so many training images, the same share of each class and one of each at least."""
    kept = stratified(data.y_train, min(images, len(data.y_train)), len(data.y_train), least=1)
    return replace(data, x_train=part(data.x_train, kept), y_train=data.y_train[kept])
