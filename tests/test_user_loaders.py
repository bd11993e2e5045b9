"""Loaders given from Python: what is trained on them, what their seed decides, and what they can't be used for."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers.command import command
from helpers.networks import Tied
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

import flowdistill
from flowdistill import UserError
from flowdistill.config import TrainConfig
from flowdistill.data import user_loaders
from flowdistill.data.user_batches import UserBatches, UserLoaderSupply
from flowdistill.ledger import Ledger
from flowdistill.runner import card as runner_card
from flowdistill.training.task import task_loss
from flowdistill.training.weights import load_weights

TRAIN = {"epochs": 2, "precision": "fp32", "lr": 0.05}


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Digits with noise from torch's global generator, as an augmentation of torchvision draws it."""

    classes = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    def __init__(self, inner: TensorDataset) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        image, label = self.inner[place]
        return image + 0.1 * torch.randn(image.shape), label


@pytest.fixture
def sets(small_npz: Path) -> tuple[TensorDataset, TensorDataset]:
    arrays = np.load(small_npz)

    def images(name: str) -> Tensor:
        return (torch.from_numpy(arrays[f"x_{name}"]).float() / 255 - 0.3) / 0.35

    return tuple(TensorDataset(images(name)[:, None], torch.from_numpy(arrays[f"y_{name}"])) for name in ("train", "test"))  # type: ignore[return-value]


@pytest.fixture
def loaders(sets: tuple[TensorDataset, TensorDataset]) -> Callable[..., tuple[Any, Any]]:
    def make(batch_size: int = 64, **how: Any) -> tuple[Any, Any]:
        return DataLoader(Noisy(sets[0]), batch_size, shuffle=True, **how), DataLoader(sets[1], 100)

    return make


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    return {"runs": tmp_path / "runs", "train": TRAIN, "progress": False}


def test_two_lines_train_and_distil_from_loaders(loaders: Any, keys: dict[str, Any]) -> None:
    teacher = flowdistill.train(Tied(8), *loaders(), **keys)
    result = flowdistill.distill(teacher, Tied(), *loaders(), method="kd", **keys)
    run = result.run
    assert run.dataset == teacher.run.dataset == f"loader:{run.data_hash[:8]}"
    assert (run.images, run.batch_size, run.nepoch) == (150, 64, 2)
    assert run.teacher_accuracy == pytest.approx(teacher.accuracy), "the teacher gets the same tensors"
    assert set(Ledger(keys["runs"]).epochs(run.no)[-1].terms) == {"task", "kd"}
    _, about = load_weights(result.folder / "student.safetensors")
    assert (about["input"], about["mean"], about["std"], about["classes"]) == ([1, 8, 8], [0.0], [1.0], 10)
    assert tuple(about["labels"]) == Noisy.classes
    module, (_, val) = result.module(), loaders()
    with torch.no_grad():
        assert sum(int((module(images).argmax(1) == labels).sum()) for images, labels in val) == run.correct


def test_the_seed_decides_what_a_loader_draws(loaders: Any, keys: dict[str, Any]) -> None:
    def terms(seed: int, folder: str, **how: Any) -> list[dict[str, float]]:
        torch.manual_seed(len(folder))  # whatever the caller's generator is
        before, own = torch.get_rng_state(), how.get("generator")
        kept = own.get_state() if own else None
        result = flowdistill.train(Tied(), *loaders(**how), seed=seed, **{**keys, "runs": keys["runs"] / folder})
        assert torch.equal(torch.get_rng_state(), before), "the caller's generator is as it was"
        assert own is None or torch.equal(own.get_state(), kept)
        return [epoch.terms for epoch in Ledger(keys["runs"] / folder).epochs(result.run.no)]

    first = terms(0, "first")
    assert first == terms(0, "again") == terms(0, "another")
    assert first != terms(1, "seed")
    assert terms(0, "own", generator=torch.Generator().manual_seed(5)) == terms(0, "own again", generator=torch.Generator().manual_seed(6))
    workers = {"num_workers": 1}
    assert terms(0, "workers", **workers) == terms(0, "workers again", **workers)


class Drawing(Noisy):
    """Noise from numpy's and Python's global generators."""

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        image, label = self.inner[place]
        return image + 0.1 * np.random.randn() + 0.1 * random.random(), label


def test_the_seed_decides_what_a_loader_draws_from_numpy_and_python(sets: Any, keys: dict[str, Any]) -> None:
    def weights(folder: str, seed: int = 0) -> str:
        numpy_before, before = np.random.get_state()[1], random.getstate()
        result = flowdistill.train(
            Tied(), DataLoader(Drawing(sets[0]), 64), DataLoader(sets[1], 100), seed=seed, **(keys | {"runs": folder})
        )
        assert (np.random.get_state()[1] == numpy_before).all()
        assert random.getstate() == before
        return result.run.weights_hash

    first = weights(keys["runs"] / "first")
    np.random.seed(len(first))
    random.seed(len(first))
    assert weights(keys["runs"] / "again") == first != weights(keys["runs"] / "seed", seed=1)


class Scaled(Noisy):
    """What it prints of itself does not tell the factor."""

    def __init__(self, inner: TensorDataset, factor: float = 1.0) -> None:
        super().__init__(inner)
        self.factor = factor

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        image, label = self.inner[place]
        return image * self.factor, label

    def __repr__(self) -> str:
        return "Scaled"


def blank(batch: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(batch), 1, 8, 8), torch.stack([label for _, label in batch])


def test_other_training_data_are_other_data(sets: Any) -> None:
    (images, labels), val = sets[0].tensors, DataLoader(sets[1], 100)
    later = labels.clone()
    later[-1] = (later[-1] + 1) % 10
    whole = TensorDataset(images, labels)
    weighted = WeightedRandomSampler([1.0] * 99 + [0.0] * 51, 150)
    sizes_of = {
        "as it is": DataLoader(whole, 50),
        "shuffled": DataLoader(whole, 50, shuffle=True),
        "drawn": DataLoader(whole, 50, sampler=weighted),
        "other labels": DataLoader(TensorDataset(images, later), 50),
        "other images": DataLoader(TensorDataset(images.flip(0), labels), 50),
        "another last image": DataLoader(Subset(whole, [*range(149), 0]), 50),
        "blank": DataLoader(whole, 50, collate_fn=blank),
        "scaled": DataLoader(Scaled(whole), 50),
        "scaled more": DataLoader(Scaled(whole, 2.0), 50),
    }
    hashes = {name: user_loaders.adopt(train, val).hash for name, train in sizes_of.items()}
    assert len(set(hashes.values())) == len(hashes)
    assert user_loaders.adopt(DataLoader(TensorDataset(images.clone(), labels), 50), val).hash == hashes["as it is"]


def test_again_trains_anew(loaders: Any, keys: dict[str, Any]) -> None:
    numbers = [flowdistill.train(Tied(), *loaders(), again=again, **keys).run.no for again in (False, False, True, False)]
    assert numbers == [1, 1, 2, 2]


def test_a_run_that_was_stopped_goes_on_bit_for_bit(loaders: Any, keys: dict[str, Any]) -> None:
    keys["train"] = {**TRAIN, "epochs": 3}
    straight = flowdistill.train(Tied(), *loaders(), **{**keys, "runs": keys["runs"] / "straight"})

    def stop(report: flowdistill.Report) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            flowdistill.train(Tied(), *loaders(), on_epoch=stop, **keys)
    result = flowdistill.train(Tied(), *loaders(), **keys)
    assert (result.run.no, result.run.resumed) == (1, 2)
    assert result.run.weights_hash == straight.run.weights_hash
    assert flowdistill.train(Tied(), *loaders(), **keys).run.no == 1, "what is finished is skipped"


class Broken(Noisy):
    """One image can't be had."""

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        if place == 200:
            raise ValueError("broken\n  at 200")
        return super().__getitem__(place)


@pytest.mark.parametrize(("workers", "recorded"), [(0, "broken"), (1, "ValueError: broken")])
def test_what_a_loader_raises_is_one_line_of_the_record(
    workers: int, recorded: str, sets: tuple[TensorDataset, TensorDataset], keys: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="broken\n  at 200"):
        flowdistill.train(Tied(), DataLoader(Broken(sets[0]), 64, num_workers=workers), DataLoader(sets[1], 100), **keys)
    run = Ledger(keys["runs"]).run(1)
    assert (run.status, run.error) == ("interrupted", recorded)
    assert command(tmp_path, "runs").out.splitlines()[1].endswith(f"  {recorded}")


@pytest.mark.usefixtures("no_kernels")
def test_engines_see_the_same_batches(loaders: Any, keys: dict[str, Any]) -> None:
    """The last batch is smaller, and compiled for itself."""
    found = [
        flowdistill.train("resnet8", *loaders(128), engine=one, **{**keys, "runs": keys["runs"] / one}) for one in ("eager", "compiled")
    ]
    assert [result.run.engine for result in found] == ["eager", "compiled"]
    eager, compiled = ([epoch.terms["task"] for epoch in Ledger(keys["runs"] / one).epochs(1)] for one in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_a_package_network_and_several_methods_learn_from_a_loader(loaders: Any, keys: dict[str, Any]) -> None:
    teacher = flowdistill.train("resnet8", *loaders(), seed=9, **keys)
    for method in ("fsp", "mgd", "dml"):
        result = flowdistill.distill(teacher, "resnet8", *loaders(), method=method, **{**keys, "train": {**TRAIN, "epochs": 1}})
        assert result.run.status == "finished"
    assert flowdistill.distill("resnet8", "resnet8", *loaders(), method="kd", **keys).run.teacher_run is not None


def test_a_teacher_of_other_images_gets_these_as_they_come(loaders: Any, keys: dict[str, Any], small_npz: Path) -> None:
    teacher = flowdistill.train("resnet8", {"name": f"npz:{small_npz}", "pad": 1}, seed=9, **keys)
    result = flowdistill.distill(teacher, Tied(), *loaders(), method="kd", **keys)
    net, (_, val) = teacher.module().eval(), loaders()
    with torch.no_grad():
        correct = sum(int((net(images).logits.argmax(1) == labels).sum()) for images, labels in val)
    assert result.run.teacher_accuracy == pytest.approx(100 * correct / 150)


def test_classes_are_counted_or_named_or_given(sets: Any, keys: dict[str, Any]) -> None:
    few = [index for index, (_, label) in enumerate(sets[1]) if label < 3]
    val = DataLoader(Subset(sets[1], few[:20]), 10)
    assert user_loaders.adopt(DataLoader(sets[0], 10), DataLoader(sets[1], 10)).classes == 10
    assert user_loaders.adopt(val, val).classes == 3
    assert user_loaders.adopt(val, val, classes=7).classes == 7
    assert user_loaders.adopt(DataLoader(Subset(Noisy(sets[1]), few), 10), val).class_names == Noisy.classes, "the names below a subset"
    with pytest.raises(UserError, match=r"10 classes, the data has 3; give a module with a classifier of the data's"):
        flowdistill.train(Tied(), val, val, **keys)
    assert flowdistill.train(Tied(), val, val, classes=10, **keys).run.status == "finished"


class Named(TensorDataset):
    """Twelve images, and whatever says how their classes are named."""

    def __init__(self, **said: Any) -> None:
        super().__init__(torch.arange(12.0).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), torch.arange(12) % 2)
        for name, value in said.items():
            setattr(self, name, value)


class Wrapped(Dataset[Any]):
    """A data set around another, as a split with transforms of its own has it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> Any:
        return self.dataset[place]


class ClassLabel:
    """As datasets.ClassLabel is seen."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)


class Reader:
    class_to_idx: ClassVar = {"cat": 1, "dog": 0}


MANY = [f"c{number:02}" for number in range(30)]
CURE = "number both alike, and let classes or class_to_idx of the data sets say so"
OTHERWISE = {
    "one lacks a class": (["a", "b", "c"], ["a", "c"], "class 1 is 'b' in train_loader and 'c' in val_loader (a, b, c against a, c)"),
    "another order": (["a", "b"], ("b", "a"), "class 0 is 'a' in train_loader and 'b' in val_loader (a, b against b, a)"),
    "another spelling": (["a", "b"], ["a", "B"], "class 1 is 'b' in train_loader and 'B' in val_loader (a, b against a, B)"),
    "many": (
        MANY,
        [*MANY[:7], *MANY[8:]],
        f"class 7 is 'c07' in train_loader and 'c08' in val_loader ({', '.join(MANY[:10])} and 20 more against "
        f"{', '.join([*MANY[:7], *MANY[8:11]])} and 19 more)",
    ),
    "class_to_idx alone": (
        {"class_to_idx": {"a": 0, "b": 1}},
        {"class_to_idx": {"b": 0, "a": 1}},
        "class 0 is 'a' in train_loader and 'b' in val_loader (a, b against b, a)",
    ),
    "class_to_idx against the order of classes": (
        {"classes": ["a", "b"], "class_to_idx": {"b": 0, "a": 1}},
        ["a", "b"],
        "class 0 is 'b' in train_loader and 'a' in val_loader (b, a against a, b)",
    ),
    "a table with a gap": (
        {"class_to_idx": {"a": 0, "c": 1}},
        {"class_to_idx": {"a": 0, "c": 2}},
        "class 1 is 'c' in train_loader and none in val_loader (a, c against a, c)",
    ),
    "a column of Hugging Face": (
        {"features": {"image": 0, "label": ClassLabel("dog", "cat")}},
        ["cat", "dog"],
        "class 0 is 'dog' in train_loader and 'cat' in val_loader (dog, cat against cat, dog)",
    ),
    "timm": ({"reader": Reader()}, ["cat", "dog"], "class 0 is 'dog' in train_loader and 'cat' in val_loader (dog, cat against cat, dog)"),
}


def a_loader(said: Any, wrap: Callable[[Any], Any] = lambda dataset: dataset) -> DataLoader[Any]:
    return DataLoader(wrap(Named(**said) if isinstance(said, dict) else Named(classes=said)), 4)


@pytest.mark.parametrize(("train", "val", "line"), OTHERWISE.values(), ids=OTHERWISE)
def test_classes_that_the_loaders_name_otherwise(train: Any, val: Any, line: str) -> None:
    wraps = [lambda dataset: dataset, Wrapped, lambda dataset: Subset(Wrapped(Subset(dataset, range(8))), range(4))]
    for wrap in wraps:
        with pytest.raises(UserError) as caught:
            user_loaders.adopt(a_loader(train), a_loader(val, wrap))
        assert str(caught.value) == f"{line}; {CURE}"


def test_classes_that_one_loader_names_otherwise_in_its_parts() -> None:
    parts = ConcatDataset([Named(classes=["a", "b"]), Wrapped(Named(classes=["b", "a"]))])
    with pytest.raises(UserError) as caught:
        user_loaders.adopt(DataLoader(parts, 4), a_loader(["a", "b"]))
    assert str(caught.value) == f"class 0 is 'a' in one data set of train_loader and 'b' in another (a, b against b, a); {CURE}"


@pytest.mark.parametrize(
    ("train", "val", "names"),
    [
        (["a", "b", "c"], ["a", "b"], ("a", "b", "c")),
        (["0", "1"], [0, 1], ("0", "1")),
        (["a", "b"], {"class_to_idx": {"b": 1, "a": 0}}, ("a", "b")),
        (["a", "b", "c"], {"class_to_idx": {"a": 0, "c": 2}}, ("a", "b", "c")),
        ({"classes": ["a", "b"], "class_to_idx": {"b": 0, "a": 1}}, {}, ("b", "a")),
        ({"classes": [("crane", "bird"), ("crane",)], "class_to_idx": {"crane": 1, "bird": 0}}, {}, ("('crane', 'bird')", "('crane',)")),
        (["crane", "boat", "crane"], ["crane", "boat"], ("crane", "boat", "crane")),
        ({"features": {"a": ClassLabel("x", "y"), "b": ClassLabel("y", "x")}}, ["a", "b"], ("a", "b")),
        ({"class_to_idx": {"a": "zero"}}, ["b", "a"], ("b", "a")),
        ({}, {}, ()),
    ],
)
def test_classes_that_the_loaders_name_alike(train: Any, val: Any, names: tuple[str, ...]) -> None:
    assert user_loaders.adopt(a_loader(train), a_loader(val)).class_names == names


def test_the_name_follows_what_is_known_of_the_images(sets: Any) -> None:
    def name(train: Any = sets[0], val: Any = sets[1], size: int = 50) -> str:
        return user_loaders.adopt(DataLoader(train, size), DataLoader(val, 100)).name

    first = name()
    assert first == name()
    assert len({first, name(size=60), name(val=Subset(sets[1], range(100))), name(train=Noisy(sets[0]))}) == 4
    images, labels = sets[1].tensors
    assert name(val=TensorDataset(images, labels.flip(0))) != first
    assert name(val=TensorDataset(images + 1, labels)) != first


def test_another_process_does_not_have_the_loaders(loaders: Any, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(report: flowdistill.Report) -> None:
        raise KeyboardInterrupt

    result = flowdistill.train("resnet8", *loaders(), **keys)
    with pytest.raises(KeyboardInterrupt):
        flowdistill.train("resnet8", *loaders(), seed=1, on_epoch=stop, **keys)
    name, runs = result.run.dataset, ["--runs", str(keys["runs"])]
    here = command(keys["runs"].parent, "evaluate", "1", *runs)
    assert here.code == 2
    assert "was trained on a loader's images, which only Python has; Result.card() measures it on them" in here.err
    assert result.export("safetensors").is_file()
    monkeypatch.setattr(user_loaders, "IN_MEMORY", {})
    for words in (["evaluate", "1"], ["card", "1"], ["export", "1", "--to", "safetensors"], ["resume", "2"], ["train", "--dataset", name]):
        said = command(keys["runs"].parent, *words, *runs)
        assert (said.code, said.out) == (2, "")
        assert said.err.count("\n") == 1
        way = "give it from Python again: the call that trained it goes on with the run, or gives its Result, which has card() and export()"
        assert f"{name} was given from Python, and is in no file; {way}" in said.err
    assert command(keys["runs"].parent, "table", *runs).code == 0


def test_a_run_on_loaders_has_a_card_of_their_images(loaders: Any, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WARM_UP": 1, "PASSES": 2, "MIN_PASSES": 1}.items():
        monkeypatch.setattr(runner_card, name, value)
    teacher = flowdistill.train(Tied(8, seed=1), *loaders(), **keys)
    student = flowdistill.distill(teacher, Tied(seed=2), *loaders(), method="kd", **keys)
    assert "flowdistill.train with the same loaders does it" in student.card()
    alone = flowdistill.train(Tied(seed=2), *loaders(), **keys)
    card, _, _ = student.card(batch_size=7).partition("## Confusions")
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for line in card.splitlines() if (cells := line.split("|"))[1:]}
    images = student.run.images
    of_record = [f"{100 * run.correct / images:.2f} % ({run.correct} of {images})" for run in (teacher.run, student.run, alone.run)]
    assert rows["accuracy"][:3] == of_record
    assert sum(int(row[0]) for name, row in rows.items() if name in Noisy.classes) == images
    assert student.card("html").startswith("<!DOCTYPE html>")
    with pytest.raises(UserError, match="card in 'pdf': choose from: md, html"):
        student.card("pdf")  # type: ignore[arg-type]


@pytest.mark.parametrize("to", ["safetensors", "torch-export", "onnx"])
def test_a_run_on_loaders_is_exported_for_their_images(to: str, loaders: Any, keys: dict[str, Any]) -> None:
    result = flowdistill.train(Tied(seed=2), *loaders(), **keys)
    file = result.export(to)
    images = torch.cat([batch for batch, _ in loaders()[1]])
    expected = result.module()(images)
    if to == "torch-export":
        torch.testing.assert_close(torch.export.load(file).module()(images), expected, rtol=1e-4, atol=1e-4)
    elif to == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        for path in (file, result.export("onnx", int8=True)):
            session = onnxruntime.InferenceSession(path)
            (given,) = session.get_inputs()
            assert (given.type, given.shape[1:]) == ("tensor(float)", [1, 8, 8])
            answers = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
            if path == file:
                torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-4)
            else:
                assert (answers.argmax(1) == expected.argmax(1)).float().mean() > 0.8


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from ()


def gives(*batches: Any) -> list[Any]:
    return list(batches)


IMAGES, LABELS = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("train", "line"),
    [
        (gives(), "train_loader: it has no batch"),
        (gives(3), "train_loader: it gives (int); it must give (images float [B, C, H, W], labels integer [B])"),
        (gives({"pixels": IMAGES}), "train_loader: it gives (dict); it must give"),
        (gives((IMAGES, LABELS, LABELS)), "train_loader: it gives (Tensor, Tensor, Tensor); it must give"),
        (gives((IMAGES.byte(), LABELS)), "train_loader: it gives (uint8 [2, 1, 8, 8], int64 [2]); it must give"),
        (gives((IMAGES, LABELS.float())), "train_loader: it gives (float32 [2, 1, 8, 8], float32 [2]); it must give"),
        (gives((IMAGES, LABELS.bool())), "train_loader: it gives (float32 [2, 1, 8, 8], bool [2]); it must give"),
        (gives((IMAGES[:, :, :4], LABELS)), "the loaders give images of 1x4x8 and of 1x8x8; give all one size"),
        (gives((IMAGES, LABELS + 40)), "the loaders give label 40, of 10 classes; labels are 0 to 9, or give classes="),
        (gives((IMAGES, LABELS - 1)), "the loaders give label -1, of 10 classes; labels are 0 to 9"),
        (gives((IMAGES, LABELS), (IMAGES, LABELS + 40)), "the loaders give label 40, of 10 classes"),
        (gives((IMAGES, LABELS), (IMAGES[..., :4], LABELS)), "the loaders give images of 1x8x8 and of 1x8x4; give all one size"),
        (DataLoader(Endless()), "train_loader: its number of batches is not known (TypeError: "),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_no_loader_of_images_is_told_in_one_line(loaders: Any, keys: dict[str, Any], train: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        flowdistill.train("resnet8", train, loaders()[1], **keys)
    assert line in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_data_set_is_no_loader(loaders: Any, keys: dict[str, Any]) -> None:
    train, val = loaders()
    for given_, name in (((train.dataset, val), "data: Noisy"), ((train, val.dataset), "val_loader: TensorDataset")):
        with pytest.raises(UserError) as caught:
            flowdistill.train(Tied(), *given_, **keys)
        assert str(caught.value) == f"{name} gives images one by one, not batches; wrap it in a DataLoader"


class Longer(list[Any]):
    """More batches than it says."""

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("what", ["train_loader", "val_loader"])
def test_images_that_are_not_finite(loaders: Any, what: str) -> None:
    whole = [(IMAGES, LABELS)]
    broken = [(torch.where(torch.arange(len(IMAGES)).view(-1, 1, 1, 1) < 2, torch.nan, IMAGES), LABELS)]
    with pytest.raises(UserError, match=f"{what}: 2 of {len(IMAGES)} images of batch 1 hold values that are not finite"):
        user_loaders.adopt(*((broken, whole) if what == "train_loader" else (whole, broken)))


class Late(list[Any]):
    """Batches of which one is broken from a pass on."""

    def __init__(self, batches: Any, number: int, on_pass: int, value: float) -> None:
        super().__init__(batches)
        self.number, self.left, self.value = number, on_pass, value

    def __iter__(self) -> Any:
        self.left -= 1
        for number, (images, labels) in enumerate(super().__iter__(), 1):
            hit = torch.arange(len(images)).view(-1, 1, 1, 1) < 3 if self.left < 1 and number == self.number else torch.tensor(False)
            yield torch.where(hit, self.value, images), labels


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("what", "number", "on_pass", "when"),
    [("train_loader", 3, 1, " in epoch 1"), ("train_loader", 1, 4, " in epoch 2"), ("val_loader", 2, 3, "")],
)
def test_images_that_are_not_finite_in_a_later_batch(
    loaders: Any, keys: dict[str, Any], value: float, what: str, number: int, on_pass: int, when: str
) -> None:
    train, val = map(list, loaders())
    pair = (Late(train, number, on_pass, value), val) if what == "train_loader" else (train, Late(val, number, on_pass, value))
    with pytest.raises(UserError) as caught:
        flowdistill.train("resnet8", *pair, **keys)
    size = len((train if what == "train_loader" else val)[number - 1][0])
    which = f"3 of {size} images of batch {number}{when}"
    assert str(caught.value) == f"{what}: {which} hold values that are not finite; mend them, or leave them out"
    (stopped,) = Ledger(keys["runs"]).runs()
    assert (stopped.status, stopped.error) == ("interrupted", str(caught.value)), "mended, it goes on"


def test_every_batch_is_looked_at() -> None:
    batches = [(IMAGES, LABELS)] * 3
    data = user_loaders.adopt(Late(batches, 3, 1, torch.nan), batches)
    with pytest.raises(UserError, match=r"^train_loader: 2 of 2 images of batch 3 in epoch 6 hold values that are not finite"):
        list(UserBatches(UserLoaderSupply(data, torch.device("cpu")), 0).epoch(5))
    data = user_loaders.adopt(batches, Late(batches, 2, 2, torch.inf))
    with pytest.raises(UserError, match=r"^val_loader: 2 of 2 images of batch 2 hold values that are not finite"):
        list(UserLoaderSupply(data, torch.device("cpu")).test.batches())


def test_classes_weigh_what_was_given_in_each_batch(loaders: Any, keys: dict[str, Any]) -> None:
    """torch's weighted mean over the loader's own batch, a smaller last one too; and as many weights as classes."""
    weights = [1.0, 9.0, *[0.5] * 8]
    train, val = loaders()
    data = user_loaders.adopt(train, val)
    supply = UserLoaderSupply(data, torch.device("cpu"))
    for images, batch in supply.seed_batches(0, TrainConfig(class_weights=weights)).epoch(0):
        logits = torch.randn(len(images), 10, generator=torch.Generator().manual_seed(0))
        expected = torch.nn.functional.cross_entropy(logits, batch.labels, torch.tensor(weights))
        assert float(task_loss(logits, batch)) == pytest.approx(float(expected), rel=1e-5)
    train_keys = {**keys, "train": {**TRAIN, "epochs": 1}}
    plain, weighed = (
        flowdistill.train("resnet8", train, val, **train_keys | {"train": {**train_keys["train"], "class_weights": how}})
        for how in ("none", weights)
    )
    assert plain.run.weights_hash != weighed.run.weights_hash
    with pytest.raises(UserError, match=r"^train.class_weights: 2 numbers for the 10 classes of loader:.*; give one for each$"):
        flowdistill.train("resnet8", train, val, **{**keys, "train": {**TRAIN, "class_weights": [1.0, 2.0]}})


def test_images_whose_sum_overflows_are_finite() -> None:
    user_loaders.Finite("train_loader").look(torch.full((2, 1, 8, 8), 3e38))


class Silent(list[Any]):
    """Fewer than it says."""

    def __len__(self) -> int:
        return 3


class Waning(list[Any]):
    """All batches on the first pass, the first few on every other."""

    def __init__(self, batches: Any, kept: int) -> None:
        super().__init__(batches)
        self.kept, self.passes = kept, 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(self[:] if self.passes == 1 else self[: self.kept])


def test_a_loader_that_can_be_gone_through_once_is_refused(loaders: Any, keys: dict[str, Any]) -> None:
    train, val = loaders()
    for given_, line in [
        ((iter(list(train)), val), "train_loader: list_iterator is an iterator, gone through once; "),
        ((train, (batch for batch in val)), "val_loader: generator is an iterator, gone through once; "),
        ((iter(train), val), "train_loader: _SingleProcessDataLoaderIter is an iterator, gone through once; "),
        ((Waning(train, 0), val), "train_loader: it gave 0 batches in epoch 1, its length is 5; give it the right length; "),
        ((train, Waning(val, 0)), "val_loader: it gave 150 images on its first pass and 0 on another; "),
        ((train, Waning(val, 1)), "val_loader: it gave 150 images on its first pass and 100 on another; "),
    ]:
        with pytest.raises(UserError) as caught:
            flowdistill.train(Tied(), *given_, **keys)
        assert str(caught.value).startswith(line)
        assert str(caught.value).endswith("must give the same images on every pass")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"val_loader": None}, "a train_loader needs a val_loader, whose images accuracy is measured on; give it after the train_loader"),
        ({"data": "digits"}, "val_loader belongs to a train_loader; digits has its own, leave val_loader out"),
        ({"data": "digits", "val_loader": None, "classes": 3}, "classes belongs to a train_loader; digits has its own, leave classes out"),
        ({"classes": "10"}, "classes='10': give an integer of 2 or more, or leave it out"),
        ({"classes": 10.0}, "classes=10.0: give an integer of 2 or more, or leave it out"),
        ({"classes": 0}, "classes=0: give an integer of 2 or more, or leave it out"),
        ({"classes": -1}, "classes=-1: give an integer of 2 or more, or leave it out"),
        ({"classes": True}, "classes=True: give an integer of 2 or more, or leave it out"),
        ({"split": "holdout"}, "split=holdout: a loader's images are not held out; give the held-out ones as val_loader, with split=full"),
        ({"train": {**TRAIN, "mixup": 0.2}}, "train.mixup=0.2: a loader's images are not mixed; mix them in the loader"),
        ({"train": {**TRAIN, "cutmix": 1.0}}, "train.cutmix=1: a loader's images are not mixed; mix them in the loader"),
        (
            {"train": {**TRAIN, "random_erasing": 0.25}},
            "train.random_erasing=0.25: a loader's images are taken as they come; erase in the loader",
        ),
        (
            {"train": {**TRAIN, "sampling": "balanced"}},
            "train.sampling=balanced: a loader decides what it draws; give it a sampler, such as WeightedRandomSampler",
        ),
        (
            {"train": {**TRAIN, "class_weights": "balanced"}},
            "train.class_weights=balanced: a loader does not tell how many images a class has; give the weights",
        ),
        ({"train": {**TRAIN, "batch_size": 7}}, "train.batch_size=7: the loader's batches have 64 images; leave batch_size out"),
        ({"teacher": Tied(8), "method": "crd"}, "this method needs the labels of all training images, which a loader does not tell"),
        ({"teacher": Tied(8), "method": "nd"}, "this method needs all training images as they are, which a loader does not tell"),
        ({"teacher": "resnet14"}, "train one: flowdistill.train('resnet14', train_loader, val_loader, seed=100)"),
        ({"val_loader": Silent()}, "val_loader: it gives no batch, though it has a length of 3; accuracy is measured on its images"),
        ({"data": Silent([(IMAGES, LABELS)])}, "train_loader: it gave 1 batches in epoch 1, its length is 3; give it the right length"),
        (
            {"data": Longer([(IMAGES, LABELS)] * 2)},
            "train_loader: it gave more batches in epoch 1, its length is 1; give it the right length",
        ),
    ],
    ids=str,
)
def test_mistakes_are_one_line(loaders: Any, keys: dict[str, Any], change: dict[str, Any], line: str) -> None:
    train, val = loaders()
    method = {"method": "kd"} if "teacher" in change else {"method": "base"}
    with pytest.raises(UserError) as caught:
        flowdistill.distill(**{"teacher": None, "student": Tied(), "data": train, "val_loader": val, **method, **keys, **change})
    assert line in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
