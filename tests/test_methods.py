"""The conformance suite: every registered method, and a composition, goes through every check.

A new method needs a file ``tests/reference/<name>.py``: the formula as slow loops, and what the suite is to know of it
(``reference/__init__.py`` says what).
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.method_cases import ALL, DATA, NAMES, REFERENCES, WRAPPED, by_part, label, make, pairs_for, wanted, widest
from helpers.pairs import FIVE, PAIRS, SEVEN, TINY_PAIRS, TWO_STAGES
from helpers.scenes import Scene, both, each_tensor, gradients, rows, scene, tensors, terms_and_gradients, total, trainable
from torch import Tensor

from flowdistill import models
from flowdistill.checks import UserError
from flowdistill.methods import METHODS, Composed, Method, get, parts, resolve
from flowdistill.methods.standardise import standardise
from flowdistill.training.teacher import teach
from flowdistill.types import Batch, DataSpec, NetSpec, Outputs

TEN = replace(DATA, classes=10)
CIFAR100 = DataSpec("cifar100", n_train=50_000, classes=100, channels=3, height=32, width=32)
CRD_PAIRS = [  # teacher, student: Tian et al. 2020, tables 1 and 2
    ("wrn-40-2", "wrn-16-2"),
    ("wrn-40-2", "wrn-40-1"),
    ("resnet56", "resnet20"),
    ("resnet110", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
    ("vgg13", "mobilenetv2"),
    ("resnet50", "mobilenetv2"),
    ("resnet50", "vgg8"),
    ("resnet32x4", "shufflenetv1"),
    ("resnet32x4", "shufflenetv2"),
    ("wrn-40-2", "shufflenetv1"),
]


def bf16_bound(name: str) -> float:
    """How far the loss may move (relative) when its inputs are rounded to bfloat16 (0.2 % a number) and summed in float32 after that."""
    return max(REFERENCES[cls.name].BF16 for cls in parts(name))


each_case_of_defaults = pytest.mark.parametrize(
    ("name", "options"), [pytest.param(*case, id=label(*case), marks=[pytest.mark.long] if case[1] else []) for case in ALL]
)
"""What takes long, with other options in make test-long alone."""
each_case = pytest.mark.parametrize(("name", "options"), [pytest.param(*case, id=label(*case)) for case in ALL])
each_pair = pytest.mark.parametrize(
    ("name", "options", "pair"), [pytest.param(*case, pair, id=f"{label(*case)}-{pair}") for case in ALL for pair in pairs_for(*case)]
)
each_name = pytest.mark.parametrize("name", NAMES)


def promising(promise: str) -> pytest.MarkDecorator:
    kept = [case for case in ALL if all(getattr(cls, promise) for cls in parts(case[0]))]
    return pytest.mark.parametrize(("name", "options"), [pytest.param(*case, id=label(*case)) for case in kept])


def refused(name: str, options: dict[str, Any], pair: tuple[NetSpec, NetSpec]) -> str:
    """Why this pair is nothing for the method, or empty."""
    try:
        make(name, options, pair)
    except ValueError as refusal:
        return str(refusal)
    return ""


def real(name: str, options: dict[str, Any], student: str, teacher: str, data: DataSpec) -> tuple[NetSpec, NetSpec]:
    """What is trained by the method, and the teacher, as specs."""
    trained = resolve(name, by_part(name, options), {}).shipped_model(student, teacher)
    return models.spec(trained, data), models.spec(teacher, data)


def as_numpy(outputs: Outputs) -> SimpleNamespace:
    return SimpleNamespace(
        logits=outputs.logits.numpy(), embedding=outputs.embedding.numpy(), maps={tap: m.numpy() for tap, m in outputs.maps.items()}
    )


def expected(method: Method, options: dict[str, dict[str, Any]], given: Scene) -> dict[str, float]:
    """By the references; what else than options they are given stands in ``reference/__init__.py``."""
    found: dict[str, float] = {}
    getattr(method, "recall", bool)()
    for part in method.methods if isinstance(method, Composed) else [method]:
        known: dict[str, Any] = {"parameters": {name: p.detach().numpy() for name, p in part.named_parameters()}}
        known |= {"buffers": {name: b.numpy().copy() for name, b in part.named_buffers()}}
        known["peers"] = [as_numpy(peer) for peer in given.batch.peers]
        known |= {"labels": given.batch.labels.tolist(), "indices": given.batch.indices.tolist(), "epoch": given.batch.epoch.item()}
        reference = REFERENCES[part.name].reference
        found |= reference(as_numpy(given.student), as_numpy(given.teacher), {**options.get(part.name, {}), **known})
    return found


def test_every_method_has_a_reference_with_all_that_the_suite_asks() -> None:
    """A method without a reference fails the suite, and so does a reference without a method."""
    assert REFERENCES.keys() == {name for name in METHODS if name != "base"} | set(WRAPPED)
    for name, module in REFERENCES.items():
        assert len(module.CASES) > 0, name
        assert 0 < module.BF16 < 0.1, name
        assert isinstance(module.WRONG, list), name  # empty where a method takes every pair


@pytest.mark.parametrize("name", [*METHODS, *WRAPPED])
def test_method_says_where_it_comes_from(name: str) -> None:
    cls = get(name)
    assert cls.name == name
    assert cls.version >= 1
    assert cls.paper.year > 1980
    assert all((cls.paper.authors, cls.paper.title, cls.paper.venue, cls.paper.url.startswith("https://")))


def test_base_adds_nothing_to_the_cross_entropy() -> None:
    method = make("base", {}, PAIRS["even"])
    assert method(*scene(PAIRS["even"])) == {}
    assert resolve("base", {}, {}).weights == {"task": 1.0}
    assert (method.uses_teacher, method.uses_labels) == (False, True)


@each_pair
def test_formula_equals_the_reference(name: str, options: dict[str, Any], pair: str) -> None:
    method = make(name, options, PAIRS[pair]).double()
    given = scene(PAIRS[pair])
    found = {term: value.item() for term, value in method(*given).items()}
    assert found == pytest.approx(expected(method, by_part(name, options), given), rel=1e-9, abs=0)


EMBEDDED = [case for case in ALL if "embedding" in getattr(REFERENCES.get(case[0]), "PULLS", ())]


@pytest.mark.parametrize(("name", "options"), EMBEDDED, ids=[label(*case) for case in EMBEDDED])
def test_formula_holds_where_the_teachers_embedding_is_wider(name: str, options: dict[str, Any]) -> None:
    """Projectors from one width to another, which the pairs do not want: their embeddings are equally wide."""
    student, teacher = PAIRS["even"]
    pair = (student, replace(teacher, embedding=student.embedding + 3))
    method, given = make(name, options, pair).double(), scene(pair)
    found = {term: value.item() for term, value in method(*given).items()}
    assert found == pytest.approx(expected(method, by_part(name, options), given), rel=1e-9, abs=0)
    assert all(gradient.norm() > 0 for gradient in gradients(method, given).values())


@each_case
def test_terms_are_float32_scalars_with_a_weight_each(name: str, options: dict[str, Any]) -> None:
    pair = widest(name, options)
    method = make(name, options, pair)
    assert resolve(name, by_part(name, options), {}).weights.keys() == {"task", *method.terms}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = method(*both(scene(pair), lambda x, dtype=dtype: x.to(dtype)))
        assert tuple(found) == method.terms
        assert {(value.dtype, value.shape) for value in found.values()} == {(torch.float32, torch.Size([]))}


@each_case
def test_labels_count_just_where_the_method_says_so(name: str, options: dict[str, Any]) -> None:
    """A method that uses labels gives another loss for others and is refused without; any other gives the same, and needs none."""
    pair = widest(name, options)
    given = scene(pair)
    known = make(name, options, pair).double()(*given)
    other = replace(given.batch, labels=(given.batch.labels + 1) % 5)
    without = replace(given.batch, labels=None)
    uses_labels = any(cls.uses_labels for cls in parts(name))
    assert make(name, options, pair).uses_labels == uses_labels
    if uses_labels:
        assert total(make(name, options, pair).double()(*given._replace(batch=other))) != total(known)
        with pytest.raises(ValueError, match="needs the labels"):
            make(name, options, pair)(*given._replace(batch=without))
    else:
        assert all(make(name, options, pair).double()(*given._replace(batch=batch)) == known for batch in (other, without))


@promising("vanishes_at_match")
def test_promise_vanishes_at_match(name: str, options: dict[str, Any]) -> None:
    pair = PAIRS["even"]
    method, apart = make(name, options, pair), scene(pair)
    match = apart._replace(student=apart.teacher)
    assert total(method(*match)).item() == pytest.approx(0, abs=1e-14)
    usual = gradients(method, apart)
    for leaf, gradient in gradients(method, match).items():
        assert gradient.norm() <= 1e-12 * usual[leaf].norm(), leaf


@promising("per_sample")
def test_promise_per_sample(name: str, options: dict[str, Any]) -> None:
    pair = widest(name, options)
    method, given = make(name, options, pair).double(), scene(pair)
    torch.testing.assert_close(method(*rows(given, [0, 1, 2, 0, 1, 2])), method(*given), rtol=1e-12, atol=0)


@each_case
def test_order_of_the_batch_changes_nothing(name: str, options: dict[str, Any]) -> None:
    pair = widest(name, options)
    method, given = make(name, options, pair).double(), scene(pair)
    torch.testing.assert_close(method(*rows(given, [2, 0, 1])), method(*given), rtol=1e-12, atol=0)


@each_case
def test_gradcheck(name: str, options: dict[str, Any]) -> None:
    pair = TINY_PAIRS[pairs_for(name, options)[-1]]
    method, given = make(name, options, pair).double(), trainable(scene(pair, n=2, relu=False))
    leaves = {f: x for f, x in tensors(given.student).items() if f in wanted(method)} | dict(method.named_parameters())
    detached = sum(getattr(REFERENCES[cls.name], "DETACHED", 0) for cls in parts(name))
    for term, found in method(*given).items():  # each on the leaves below it: one may hold still what another trains
        below = {id(leaf) for leaf in leaves_below(found)}
        names = [f for f, leaf in leaves.items() if id(leaf) in below]
        constants: list[Tensor] = []

        def value(*inputs: Tensor, term: str = term, names: list[str] = names, constants: list[Tensor] = constants) -> Tensor:
            moved = dict(zip(names, inputs, strict=True))
            ours = given.student
            maps = {tap: moved.get(tap, m) for tap, m in ours.maps.items()}
            student = Outputs(moved.get("logits", ours.logits), moved.get("embedding", ours.embedding), maps)
            learned = {p: moved[p] for p, _ in method.named_parameters() if p in moved}
            with held(constants):
                terms: dict[str, Tensor] = torch.func.functional_call(method, learned, (student, given.teacher, given.batch))
            return terms[term]

        value(*(leaves[f] for f in names))
        assert len(constants) == detached
        assert torch.autograd.gradcheck(value, [leaves[f] for f in names])


@contextlib.contextmanager
def held(constants: list[Tensor]) -> Iterator[None]:
    """What is detached within stays what it was the first time, as the analytic gradient has it."""
    detach, number = Tensor.detach, itertools.count()

    def first_value(x: Tensor) -> Tensor:
        index = next(number)
        if index == len(constants):
            constants.append(detach(x).clone())  # gradcheck moves its inputs in place
        return constants[index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "detach", first_value)
        yield


@each_pair
def test_gradient_reaches_what_is_requested_and_the_adapters_alone(name: str, options: dict[str, Any], pair: str) -> None:
    method, given = make(name, options, PAIRS[pair]), trainable(both(scene(PAIRS[pair]), Tensor.float))
    loss = total(method(*given))
    owners = {id(x): f for f, x in [*tensors(given.student).items(), *method.named_parameters()]}
    reached = {owners.get(id(leaf), "a tensor of nobody's") for leaf in leaves_below(loss)}
    assert reached == wanted(method) | {p for p, _ in method.named_parameters()}
    assert all(gradient.norm() > 0 for gradient in gradients(method, both(scene(PAIRS[pair]), Tensor.float)).values())


def leaves_below(loss: Tensor) -> list[Tensor]:
    """Every leaf that a backward pass from here would give a gradient to."""
    found, seen, ahead = [], set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        ahead += [following for following, _ in node.next_functions]
    return found


@each_case_of_defaults
def test_needs_are_taps_that_every_model_has(name: str, options: dict[str, Any]) -> None:
    for model in models.MODELS:
        pair = real(name, options, model, model, DATA)
        if refused(name, options, pair):
            continue  # as two taps of a VGG are one tensor
        needs = make(name, options, pair).needs
        assert needs.student <= {tap.name for tap in pair[0].taps}, model
        assert needs.teacher <= {tap.name for tap in pair[1].taps}, model


@each_case
@pytest.mark.parametrize(("teacher", "student"), CRD_PAIRS, ids=[f"{teacher}-{student}" for teacher, student in CRD_PAIRS])
def test_the_pairs_of_the_crd_benchmark_are_built_or_refused_with_the_cure(
    name: str, options: dict[str, Any], teacher: str, student: str
) -> None:
    refusal = refused(name, options, real(name, options, student, teacher, CIFAR100))
    if refusal:
        assert any(refusal.startswith(f"{part}: ") for part in by_part(name, options))
        assert "set options." in refusal or "choose " in refusal, refusal


@each_case
def test_a_teacher_of_other_classes_teaches_or_is_refused_by_both_numbers(name: str, options: dict[str, Any]) -> None:
    """On the networks themselves; of a mutual method the other student is a peer, of the same classes."""
    student, teacher = real(name, options, "resnet8", "resnet14", DATA)[0], models.spec("resnet14", TEN)
    refusal = refused(name, options, (student, teacher))
    if refusal:
        assert "4 classes, resnet14 10;" in refusal
        return
    method = make(name, options, (student, teacher), classes=DATA.classes)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = models.build(student.name, DATA, taps=tuple(method.needs.student), seed=0)(images)
    teacher_outputs = teach(models.build("resnet14", TEN, taps=tuple(method.needs.teacher), seed=1).eval(), images, "fp32")
    terms = method(shown, teacher_outputs, Batch(torch.arange(4), torch.arange(4), peers=(shown,)))
    assert terms
    assert all(value.shape == () and value.isfinite() for value in terms.values())


def test_methods_that_compare_classes_refuse_a_teacher_of_other_classes() -> None:
    """Those that compare logits or class maps do not."""
    pair = models.spec("resnet8", DATA), models.spec("resnet14", TEN)
    takes = {name for name in METHODS if name not in ("base", "simkd") and not refused(name, {}, pair)}
    logits = {name for name in METHODS if get(name).kind == "logits" and get(name).uses_teacher}
    assert set(METHODS) - takes == logits | {"base", "simkd", "cat_kd", "irg"}


def test_methods_that_compare_classes_refuse_another_order_of_them() -> None:
    """Those that take one of another number; where one side has no names nobody can know."""

    def refusals(student_labels: str, teacher_labels: str) -> dict[str, str]:
        pair = (
            replace(models.spec("resnet8", DATA), labels=tuple(student_labels)),
            replace(models.spec("resnet14", DATA), labels=tuple(teacher_labels)),
        )
        found = {name: refused(name, {}, pair) for name in METHODS if name not in ("base", "simkd")}
        return {name: line for name, line in found.items() if line}

    logits = {name for name in METHODS if get(name).kind == "logits" and get(name).uses_teacher}
    found = refusals("abcd", "abdc")
    assert set(found) == (logits | {"cat_kd", "irg"}) - {"simkd"}
    assert all("class 2 of resnet8 is 'c', of resnet14 'd'; logits are compared class by class" in line for line in found.values())
    assert refusals("abcd", "") == refusals("", "abcd") == refusals("abcd", "abcd") == {}


def test_logits_on_the_embedding_takes_a_teacher_of_other_classes() -> None:
    pair = models.spec("resnet8", DATA), models.spec("resnet14", TEN)
    assert refused("logits", {"on": "embedding"}, pair) == ""


def test_the_option_on_of_logits_is_dumped_where_it_is_not_the_default() -> None:
    """A run that was recorded before there was a choice keeps its fingerprint."""
    plain, embedded = (resolve("logits", {"logits": given}, {}) for given in ({"on": "logits"}, {"on": "embedding"}))
    assert (plain.options["logits"].model_dump(), plain.variant) == ({}, "")
    assert (embedded.options["logits"].model_dump(), embedded.variant) == ({"on": "embedding"}, "on=embedding")
    assert plain.weights == embedded.weights == {"task": 1.0, "logits": 1.0}


@each_case
def test_real_networks_learn_and_the_teacher_stays(name: str, options: dict[str, Any]) -> None:
    pair = real(name, options, "resnet8", "resnet14", DATA)
    method = make(name, options, pair)
    student = models.build(pair[0].name, DATA, taps=tuple(method.needs.student), seed=0)
    teacher = models.build("resnet14", DATA, taps=tuple(method.needs.teacher), seed=1).eval()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = student(images)
    below = set(leaves_below(total({name: x.sum() for name, x in tensors(shown).items() if name in wanted(method)})))
    teacher_outputs = teach(teacher, images, "fp32")
    total(method(shown, teacher_outputs, Batch(torch.arange(4), torch.arange(4), peers=(teacher_outputs,)))).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in student.parameters() if p in below)
    assert all(p.grad is None for p in teacher.parameters())


@each_case
def test_inputs_are_left_as_they_were(name: str, options: dict[str, Any]) -> None:
    pair = widest(name, options)
    for dtype in (torch.float32, torch.bfloat16):
        given = both(scene(pair), lambda x, dtype=dtype: x.to(dtype))
        before = both(given, torch.clone)
        make(name, options, pair)(*given)
        for now, then in zip(given[:2], before[:2], strict=True):
            assert all(torch.equal(tensors(now)[f].view(torch.int16), x.view(torch.int16)) for f, x in tensors(then).items())


@each_case
def test_bf16_inputs_come_close_to_float32(name: str, options: dict[str, Any]) -> None:
    pair = widest(name, options)
    method, given = make(name, options, pair), both(scene(pair, n=8), Tensor.float)
    torch.testing.assert_close(method(*both(given, Tensor.bfloat16)), method(*given), rtol=bf16_bound(name), atol=0)


@each_pair
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_is_for_storage_and_never_for_arithmetic(name: str, options: dict[str, Any], pair: str, dtype: torch.dtype) -> None:
    method, given = make(name, options, PAIRS[pair]), both(scene(PAIRS[pair]), lambda x: x.to(dtype))
    torch.testing.assert_close(method(*given), method(*both(given, Tensor.float)), rtol=1e-6, atol=0)


@each_case
def test_autocast_does_not_bring_half_back(name: str, options: dict[str, Any]) -> None:
    method, given = make(name, options, PAIRS["even"]), both(scene(PAIRS["even"]), Tensor.float)
    outside = method(*given)
    with torch.autocast("cpu", torch.bfloat16):
        inside = method(*given)
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=0)


def scaled(outputs: Outputs, logits: float = 1, maps: float = 1) -> Outputs:
    return outputs._replace(logits=outputs.logits * logits, maps={tap: m * maps for tap, m in outputs.maps.items()})


def dead_channel(outputs: Outputs) -> Outputs:
    return outputs._replace(maps={tap: torch.cat([torch.zeros_like(m[:, :1]), m[:, 1:]], 1) for tap, m in outputs.maps.items()})


EXTREMES: dict[str, Callable[[Scene], Scene]] = {
    "logits x 1e3": lambda s: s._replace(student=scaled(s.student, 1e3), teacher=scaled(s.teacher, 1e3)),
    "logits of the student x 1e3": lambda s: s._replace(student=scaled(s.student, 1e3)),
    "logits x 1e3 in bf16": lambda s: both(
        s._replace(student=scaled(s.student, 1e3), teacher=scaled(s.teacher, 1e3)), lambda x: x.bfloat16()
    ),
    "student's maps zero": lambda s: s._replace(student=scaled(s.student, maps=0)),
    "teacher's maps zero": lambda s: s._replace(teacher=scaled(s.teacher, maps=0)),
    "all maps zero": lambda s: s._replace(student=scaled(s.student, maps=0), teacher=scaled(s.teacher, maps=0)),
    "one sample zero": lambda s: s._replace(student=each_tensor(s.student, lambda x: torch.cat([x[:1] * 0, x[1:]]))),
    "a dead channel": lambda s: s._replace(student=dead_channel(s.student)),
    "a batch of one": lambda s: rows(s, [0]),
    "maps x 40 in float16": lambda s: both(Scene(scaled(s.student, 1, 40), scaled(s.teacher, 1, 40), s.batch), lambda x: x.half()),
    "maps x 40 in bf16": lambda s: both(Scene(scaled(s.student, 1, 40), scaled(s.teacher, 1, 40), s.batch), lambda x: x.bfloat16()),
}


@each_case
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes_stay_finite(name: str, options: dict[str, Any], extreme: str) -> None:
    pair = widest(name, options)
    method, given = make(name, options, pair), EXTREMES[extreme](both(scene(pair), Tensor.float))
    assert total(method(*given)).isfinite()
    for leaf, gradient in gradients(method, given).items():
        assert gradient.isfinite().all(), leaf
        assert gradient.abs().max() < 1e8, leaf  # a norm kept from 0 by 1e-12 alone gives 1e9 and more


@each_case_of_defaults
def test_compiled_equals_eager(name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    pair = widest(name, options)
    method, given = make(name, options, pair), both(scene(pair), Tensor.float)
    compiled = torch.compile(method, backend="aot_eager", fullgraph=True)
    terms, pulls = terms_and_gradients(method, given, compiled)
    expected_terms, expected_pulls = terms_and_gradients(method, given, method)
    torch.testing.assert_close(terms, expected_terms, rtol=1e-6, atol=0)
    torch.testing.assert_close(pulls, expected_pulls, rtol=1e-5, atol=1e-9)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("name", ["kd", "at", "fsp"])
def test_generated_code_equals_eager(name: str) -> None:
    """Inductor's kernels, which take seconds to generate, so for three.

    They sum in another order, and the rounding of a sum is that of its largest terms: each gradient is held to 8 float32 steps of its
    largest entry.
    """
    torch._dynamo.reset()
    method, given = make(name, {}, widest(name, {})), both(scene(widest(name, {})), Tensor.float)
    compiled = torch.compile(method, backend="inductor", fullgraph=True)
    terms, ours = terms_and_gradients(method, given, compiled)
    expected_terms, theirs = terms_and_gradients(method, given, method)
    torch.testing.assert_close(terms, expected_terms, rtol=1e-6, atol=0)
    for leaf, gradient in theirs.items():
        assert (ours[leaf] - gradient).abs().max() <= 8 * torch.finfo(torch.float32).eps * gradient.abs().max(), leaf


WRONG = [
    *((name, *wrong) for name, module in REFERENCES.items() for wrong in module.WRONG),
    ("at+kd", {}, FIVE, SEVEN, ["kd", "5 classes", "7"]),
    ("at+kd", {}, FIVE, TWO_STAGES, ["at", "'stage3'", "choose networks with the same stages"]),
]
WRONG_NAMES = ("name", "options", "student", "teacher", "words")


@pytest.mark.parametrize(WRONG_NAMES, WRONG, ids=[f"{w[0]}-{w[2].name}-{w[3].name}-{i}" for i, w in enumerate(WRONG)])
def test_wrong_pair_is_refused_with_the_cure(
    name: str, options: dict[str, Any], student: NetSpec, teacher: NetSpec, words: list[str]
) -> None:
    with pytest.raises(ValueError) as refusal:
        make(name, options, (student, teacher))
    assert [word for word in words if word not in str(refusal.value)] == []


def test_composition_is_its_parts() -> None:
    given = scene(PAIRS["even"])
    together = make("at+kd", {"at": {"mode": "paper"}, "kd": {"T": 2.0}}, PAIRS["even"])(*given)
    assert together == make("at", {"mode": "paper"}, PAIRS["even"])(*given) | make("kd", {"T": 2.0}, PAIRS["even"])(*given)


def test_a_wrapped_method_is_composed_and_kept_apart_from_the_plain_one() -> None:
    given = scene(PAIRS["even"])
    options = {"at": {"mode": "paper"}, "ls:kd": {"T": 3.0}, "kd": {"T": 3.0}}
    together = make("ls:kd+at+kd", options, PAIRS["even"])(*given)
    assert together.keys() == {"at", "kd", "ls:kd"}
    assert together == {
        **make("at", options["at"], PAIRS["even"])(*given),
        **make("kd", options["kd"], PAIRS["even"])(*given),
        **make("ls:kd", options["ls:kd"], PAIRS["even"])(*given),
    }
    assert together["ls:kd"] != together["kd"]
    resolved = resolve("ls:kd+at", {"ls:kd": {"T": 3}}, {"at": 2.0})
    assert (resolved.name, resolved.variant) == ("at+ls:kd", "T=3, weights.at=2")
    assert resolved.weights == {"task": 1.0, "at": 2.0, "ls:kd": 9.0}
    assert make("ls:kd+at", {"ls:kd": {"T": 3.0}}, PAIRS["even"]).versions == {"at": 1, "ls:kd": 1}


@pytest.mark.parametrize(
    ("name", "weight", "temperature"), [("ls:kd", 9, 2), ("ls:dkd", 9, 2), ("ls:mlkd", 9, 2), ("ls:logits", 1, None), ("ls:wsld", 2.5, 2)]
)
def test_wrapped_methods_have_the_defaults_of_the_authors_who_wrapped_them(name: str, weight: float, temperature: float | None) -> None:
    resolved = resolve(name, {}, {})
    assert resolved.weights == {"task": 1, name: weight}
    assert resolved.variant == ""
    assert getattr(resolved.options[name], "T", None) == temperature


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ls:at", "method 'ls:at': at compares features, but ls: standardises the logits of both; put it before kd"),
        ("at+ls:rkd", "method 'ls:rkd': rkd compares relations, but ls: standardises the logits of both; put it before kd"),
        (
            "ls:tf_kd",
            "method 'ls:tf_kd': tf_kd looks at no teacher, but ls: standardises the logits of both; put it before kd",
        ),
        ("ls:base", "method 'ls:base': base looks at no teacher, but ls: standardises the logits of both; put it before kd"),
        ("ls:ls:kd", "method 'ls:ls:kd' standardises what is standardised already; write ls: once"),
        ("ls:dk", "unknown method 'dk': "),
    ],
)
def test_what_compares_no_logits_is_not_standardised(name: str, line: str) -> None:
    with pytest.raises(UserError) as refusal:
        resolve(name, {}, {})
    assert str(refusal.value).startswith(line)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.0])
def test_a_constant_row_is_standardised_to_zeros(value: float) -> None:
    logits = torch.stack([torch.full((10,), value), torch.arange(10.0)]).requires_grad_()
    found = standardise(logits)
    (gradient,) = torch.autograd.grad(found[:, 0].sum(), logits)
    assert found[0].softmax(0).tolist() == pytest.approx([0.1] * 10, abs=1e-6)
    assert found[1].std().item() == pytest.approx(1, rel=1e-6)
    assert gradient.abs().max() < 1e5


@pytest.mark.parametrize(("options", "printed"), [({}, ""), ({"T": 4}, ""), ({"T": 2}, "T=2"), ({"T": 2.5}, "T=2.5")])
def test_variant_prints_what_differs(options: dict[str, Any], printed: str) -> None:
    assert resolve("kd", {"kd": options}, {}).variant == printed


@pytest.mark.parametrize("name", [name for name in METHODS if name != "base"])
def test_nonsense_for_an_option_or_a_weight_is_told_in_one_line(name: str) -> None:
    for field in get(name).Options.model_fields:
        with pytest.raises(UserError) as refusal:
            resolve(name, {name: {field: "nonsense"}}, {})
        assert str(refusal.value).startswith((f"options.{name}.{field}='nonsense': ", f"options.{name}: {field} "))
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=rf"^unknown key 'options\.{name}\.nonsense': (choose from|there is none|did you mean)"):
        resolve(name, {name: {"nonsense": 1}}, {})
    with pytest.raises(UserError, match=rf"^weights\.nonsense: method '{name}' has no such term; "):
        resolve(name, {}, {"nonsense": 1.0})
    with pytest.raises(UserError, match=r"a weight is 0 or more$"):
        resolve(name, {}, {get(name).terms[0]: -1.0})
