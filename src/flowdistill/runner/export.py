"""A student for use elsewhere: one file, compared with the network on real images before it is written."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..checks import Changes, UserError, obstacle, summary
from ..data.batches import eval_set
from ..data.dataset import ImageData
from ..data.interfaces import EvalSet, First
from ..data.normalisation import Normalisation
from ..data.splits import stratified
from ..data.user_batches import UserBatches, UserLoaderSet, UserLoaderSupply
from ..data.user_loaders import UserLoaderData
from ..models import Network
from ..registry import Registry
from ..training.evaluate import answering
from ..training.student_file import StudentMetadata
from ..training.weights import refuse_misfit, serialised, write_whole
from ..types import Outputs
from .evaluate import load_fitting, load_network

IMAGES = 64  # test images that a file is compared on, all at once and one by one
TOLERANCE = 1e-4  # of the largest logit's size
CALIBRATION = 512  # training images, the same share of each class, that int8 ranges are read from
OPSET = 18  # of ONNX: its first with all that the networks need, read by onnxruntime since 1.14
AXIS, INPUT, OUTPUT, FEATURES = "batch", "images", "logits", "features"
METADATA = "flowdistill.json"

Answer = Callable[[Tensor], Tensor]


class DeviationError(Exception):
    """An exported file does not answer as the network does."""


class Program(nn.Module):
    """Images uint8 [N, H, W, C] -> logits float32 [N, K]: the normalisation and the network in one, in eval mode and fp32.

    A backbone, which has no classifier, gives its pooled features [N, D] in their place.

    Without a normalisation the images are float32 [N, C, H, W], as a loader gives them.
    """

    def __init__(self, net: Network, normalisation: Normalisation | None) -> None:
        super().__init__()
        self.net, self.normalise = net, _as_they_are if normalisation is None else normalisation.on(torch.device("cpu"))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images -> logits [N, K], or the features of a backbone."""
        outputs: Outputs = self.net(self.normalise(images))
        return outputs.logits if self.net.spec.classes else outputs.embedding

    @property
    def output(self) -> str:
        """What its answer is called."""
        return OUTPUT if self.net.spec.classes else FEATURES


def _as_they_are(images: Tensor) -> Tensor:
    return images


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        suffix: takes the place of ``.safetensors`` in the name of the student's file.
        write: (program, one image, metadata) -> the file's content.
        read: (content, program) -> the file's answer to images. Only the program's code is used, not its weights.
        needs: packages beyond those that are always installed.
    """

    suffix: str
    write: Callable[[Program, Tensor, Mapping[str, str]], bytes]
    read: Callable[[bytes, Program], Answer]
    needs: tuple[str, ...] = ()


class Exported(NamedTuple):
    """A file that was written.

    Attributes:
        file, to, model, bytes: its path, its format, the network's model and its size.
        images, difference, allowed: number of test images, the largest difference of a logit on them, and what is allowed (before int8).
        accuracy_fp32, accuracy_int8: percent of all test images, of the program and of its int8 form. None without int8.
    """

    file: str
    to: str
    model: str
    bytes: int
    images: int
    difference: float
    allowed: float
    accuracy_fp32: float | None = None
    accuracy_int8: float | None = None


def export(
    path: Path, to: str, *, out: Path | None = None, dataset: str | None = None, int8: bool = False, changes: Changes | None = None
) -> Exported:
    """Write a student's file in another format. Its answers to test images are compared with the network's first.

    Args:
        path: a student's file.
        to: a name in ``FORMATS``.
        out: the file to write. Default: beside the student's.
        dataset: where the images come from. Default: the data that the student was trained on.
        int8: quantise the ONNX file that was found to agree. Its accuracy is measured, not judged.

    Raises:
        UserError: the student or its data can't be read, the file can't be written there, a package is missing, or the network does
            what torch.export can't trace.
        DeviationError: a logit differs by more than ``TOLERANCE`` times the largest, or a most probable class does; nothing was written.
    """
    form = FORMATS[to]
    if int8 and to != "onnx":
        raise UserError(f"--int8 with --to {to}: only ONNX files are quantised; use --to onnx, or leave --int8 out")
    _refuse_missing(to, form.needs)
    changes = changes or Changes()
    net, about = load_network(path, changes)
    if int8 and about.backbone:
        raise UserError(f"--int8: {path} is a backbone, and int8 is judged by an accuracy, which it has not; leave --int8 out")
    out = path.with_suffix(".int8.onnx" if int8 else form.suffix) if out is None else out.expanduser()
    _refuse_place(out, path)
    data = load_fitting(path, about, dataset, changes)
    images, test = _test_images(data)
    if to == "onnx" and net.draws_always:
        raise UserError(
            f"{about.model} draws random numbers in eval mode, which an ONNX file can't do alike; use --to torch-export or safetensors"
        )
    normalisation = None if about.data.user_loaders else Normalisation(about.mean, about.std)
    program, file_metadata = Program(net, normalisation), metadata(net, about)
    content = form.write(program, images[:1], file_metadata)
    answer = form.read(content, program)
    difference, allowed = compare(program, answer, images, to)
    accuracies = []
    if int8:
        content = _quantised(content, data)
        accuracies = [_accuracy(function, test) for function in (answer, form.read(content, program))]
        measured = {"accuracy": accuracies[-1], "data": dataset or about.data.name, "quantisation": "int8"}
        content = _with_metadata(content, file_metadata | {key: json.dumps(value) for key, value in measured.items()})
    write_whole(out, content)
    return Exported(str(out), to, about.model, len(content), len(images), difference, allowed, *accuracies)


def _test_images(data: ImageData) -> tuple[Tensor, EvalSet]:
    """The first ``IMAGES`` test images, and all of them, as a program takes them."""
    if isinstance(data, UserLoaderData):
        test: EvalSet = UserLoaderSet(data, torch.device("cpu"))
        return torch.cat([images for images, _ in First(test, IMAGES).batches()]).contiguous(), test
    images = data.x_test if data.classes else data.x_train  # without labels there are no test images
    return torch.from_numpy(images[:IMAGES]), eval_set(data.x_test, data.y_test, _as_they_are, torch.device("cpu"))


def metadata(net: Network, about: StudentMetadata) -> dict[str, str]:
    """What every file says of itself, each value as JSON: model, classes, input (channels, height, width), mean and std of pixels in
    0..1, the test accuracy of the run in percent, its data, and the classes' names where the student's file has them. A backbone has 0
    classes and no accuracy.
    """
    values: dict[str, Any] = {
        "model": about.model,
        "classes": about.classes,
        "input": about.input,
        "mean": about.mean,
        "std": about.std,
        **({} if about.correct is None else {"accuracy": 100 * about.correct / about.images}),
        "data": about.data.unlabelled if about.data.no_labels else about.data.name,
    }
    if net.about.get("labels"):
        values["labels"] = net.about["labels"]
    return {key: json.dumps(value) for key, value in values.items()}


@torch.no_grad()
def compare(program: Program, answer: Answer, images: Tensor, to: str) -> tuple[float, float]:
    """The largest absolute difference of a logit, in a batch of all images and in batches of one, and how much is allowed.

    If a network draws random numbers in eval mode, program and file draw the same. If its buffers change then, both begin from the same.

    Raises:
        DeviationError: a logit differs by more than is allowed, or a most probable class differs.
    """

    def ask(function: Answer, batches: Sequence[Tensor]) -> Tensor:
        answers = []
        for step, batch in enumerate(batches):
            with answering(program.net, "export", step, images.device):
                answers.append(function(batch))
        return torch.cat(answers)

    differs_alone = program.net.draws_always or program.net.unsettled  # then an image is answered otherwise than among others
    expected = ask(program, [images])
    allowed, singles = TOLERANCE * expected.abs().max().item(), [image[None] for image in images]
    pairs = [(ask(answer, [images]), expected), (ask(answer, singles), ask(program, singles) if differs_alone else expected)]
    difference = max((actual - right).abs().max().item() for actual, right in pairs)
    changed = max(int((actual.argmax(1) != right.argmax(1)).sum()) for actual, right in pairs) if program.output == OUTPUT else 0
    if changed or not difference <= allowed:  # NaN is no agreement
        one = "test images a logit" if program.output == OUTPUT else "images a feature"
        raise DeviationError(
            f"the {to} file does not answer as the network does: on {len(images)} {one} differs by "
            f"{difference:.2g} ({allowed:.2g} is allowed), {changed} of the most probable classes differ; nothing was written"
        )
    return difference, allowed


def _refuse_missing(to: str, packages: tuple[str, ...]) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"--to {to} needs {package}, which is not installed: pip install onnx onnxscript onnxruntime")


def _refuse_place(out: Path, source: Path) -> None:
    if out.resolve() == source.expanduser().resolve():
        raise UserError(f"--out {out}: that is the student's own file; name another")
    if reason := obstacle(out):
        raise UserError(f"--out {out}: cannot be written there ({reason}); name another file")


def _write_safetensors(program: Program, _: Tensor, metadata: Mapping[str, str]) -> bytes:
    return serialised(program.net.state_dict(), program.net.about, metadata)


def _read_safetensors(content: bytes, program: Program) -> Answer:
    weights = safetensors.torch.load(content)
    refuse_misfit(program.net, weights, "the file")
    body = next(path for path, module in program.named_modules() if module is program.net.body)
    tensors = {f"{body}.{name}": value for name, value in weights.items()}
    parameters = dict(program.named_parameters(remove_duplicate=False))

    def answer(images: Tensor) -> Tensor:
        state = {name: value if name in parameters else value.clone() for name, value in tensors.items()}  # buffers may move
        logits: Tensor = functional_call(program, state, images, tie_weights=False)  # no copy of it: old weight norms refuse one
        return logits

    return answer


def _traced(program: Program, image: Tensor) -> torch.export.ExportedProgram:
    """Trace the program for any number of images: with two, since one would be taken for a constant. No path of this machine stays in it.

    Raises:
        UserError: its code branches on values, or torch.export can't follow it for another reason.
    """
    two, sizes = torch.cat([image, image]), {INPUT: {0: torch.export.Dim(AXIS)}}
    with _one_line(f"torch.export can't trace {program.net.spec.name}", "--to safetensors"):
        traced = torch.export.export(program, (two,), dynamic_shapes=sizes)
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)
    return traced


@contextmanager
def _one_line(subject: str, cure: str) -> Iterator[None]:
    """Inside, an error is told in one line, by its first cause, and nothing is printed.

    Raises:
        UserError: there is an error.
    """
    try:
        with _unlogged(logging.ERROR), redirect_stderr(io.StringIO()):
            yield
    except Exception as error:  # of the network's own code, or an operation that is not known
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"{subject}: {summary(cause)}; use {cure}") from None


@contextmanager
def _unlogged(level: int) -> Iterator[None]:
    """Inside, no messages of that level or below it are logged."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


def _write_torch_export(program: Program, image: Tensor, metadata: Mapping[str, str]) -> bytes:
    buffer = io.BytesIO()
    values = {key: json.loads(value) for key, value in metadata.items()}
    torch.export.save(_traced(program, image), buffer, extra_files={METADATA: json.dumps(values)})
    return buffer.getvalue()


def _read_torch_export(content: bytes, _: Program) -> Answer:
    return torch.export.load(io.BytesIO(content)).module()


def _write_onnx(program: Program, image: Tensor, metadata: Mapping[str, str]) -> bytes:
    traced = _traced(program, image)
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [program.output], "dynamic_shapes": {INPUT: {0: AXIS}}}
    with _one_line(f"ONNX can't express {program.net.spec.name}", "--to torch-export or safetensors"):
        exported = torch.onnx.export(traced, **names, opset_version=OPSET, dynamo=True, verbose=False)
    assert exported is not None
    model = exported.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # names of this package's modules, at every operation
    return _with_metadata(model.SerializeToString(), metadata)


def _with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    import onnx

    model = onnx.load_from_string(content)
    onnx.helper.set_model_props(model, dict(metadata))
    changed: bytes = model.SerializeToString()
    return changed


def _read_onnx(content: bytes, program: Program) -> Answer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([program.output], {INPUT: images.numpy()})[0])


class _Calibration:
    """Images in batches, as onnxruntime asks for them."""

    def __init__(self, images: npt.NDArray[Any]) -> None:
        self.batches = (images[start : start + IMAGES] for start in range(0, len(images), IMAGES))

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        images = next(self.batches, None)
        return None if images is None else {INPUT: images}


def _quantised(content: bytes, data: ImageData) -> bytes:
    """The file with int8 convolutions and classifier. Weights have a scale per output channel, activations one per tensor, which spans
    the values that the calibration images gave.
    """
    from onnxruntime.quantization import quantize_static

    with _unlogged(logging.WARNING), TemporaryDirectory() as folder:  # it advises to fuse the batch normalisations, which was done
        exact, quantised = Path(folder) / "exact.onnx", Path(folder) / "int8.onnx"
        exact.write_bytes(content)
        quantize_static(exact, quantised, _Calibration(_calibrating(data)), per_channel=True)
        return quantised.read_bytes()


def _calibrating(data: ImageData) -> npt.NDArray[Any]:
    """``CALIBRATION`` training images, as a program takes them: the same share of each class, or a loader's first."""
    if not isinstance(data, UserLoaderData):
        return data.x_train[stratified(data.y_train, min(CALIBRATION, len(data.y_train)), len(data.y_train), least=1)]
    supply, parts, count = UserLoaderSupply(data, torch.device("cpu")), list[Tensor](), 0
    for images, _ in UserBatches(supply, 0).epoch(0):
        parts.append(images)
        count += len(images)
        if count >= CALIBRATION:
            break
    return torch.cat(parts)[:CALIBRATION].contiguous().numpy()


def _accuracy(answer: Answer, test: EvalSet) -> float:
    """The accuracy on all test images, in percent."""
    correct = sum(int((answer(images).argmax(1) == labels).sum()) for images, labels in test.batches())
    return 100 * correct / len(test)


FORMATS: Registry[Format] = Registry("export format", "flowdistill.exporters")
FORMATS.register("safetensors")(Format(".export.safetensors", _write_safetensors, _read_safetensors))
FORMATS.register("torch-export")(Format(".pt2", _write_torch_export, _read_torch_export))
FORMATS.register("onnx")(Format(".onnx", _write_onnx, _read_onnx, ("onnx", "onnxscript", "onnxruntime")))
