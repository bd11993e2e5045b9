"""What the losses give where their formulas have a limit: a class that is never said, images nearly alike, small maps, a single class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.method_cases import ALL, label, make, wanted, widest
from helpers.pairs import PAIRS, network
from helpers.scenes import Scene, both, gradients, scene, total
from torch import Tensor

from flowdistill import models
from flowdistill.methods import METHODS, build, get, resolve
from flowdistill.methods.base import Method
from flowdistill.methods.kd import kd_loss
from flowdistill.methods.kdsvd import kdsvd_loss
from flowdistill.methods.rkd import angle_loss
from flowdistill.methods.standardise import standardise
from flowdistill.types import Batch, DataSpec, NetSpec, Outputs

EVEN = PAIRS["even"]
PROBABILITIES = [name for name in METHODS if getattr(get(name), "probabilities", False)]
CIFAR100 = DataSpec("cifar100", n_train=50_000, classes=100, channels=3, height=32, width=32)


def never(outputs: Outputs, classes: list[int], value: float) -> Outputs:
    logits = outputs.logits.clone()
    logits[:, classes] = value
    return outputs._replace(logits=logits)


def masked(given: Scene, classes: list[int], value: float, *, student: bool = False) -> Scene:
    peers = tuple(never(peer, classes, value) for peer in given.batch.peers)
    ours = never(given.student, classes, value) if student else given.student
    return Scene(ours, never(given.teacher, classes, value), replace(given.batch, peers=peers))


@pytest.mark.parametrize("student", [False, True], ids=["teacher", "both"])
@pytest.mark.parametrize("classes", [[4], [3, 4], [1]], ids=["one", "two", "a label"])
@pytest.mark.parametrize("name", [*PROBABILITIES, "dml"])
def test_a_class_that_is_never_said_is_the_limit_of_one_that_is_hardly_said(name: str, classes: list[int], student: bool) -> None:
    """The labels are 0, 1 and 2. 0 log 0 = 0: the value, and every gradient, is that of a logit of -1e300."""
    method = make(name, {}, EVEN).double()
    exact, limit = (masked(scene(EVEN), classes, value, student=student) for value in (-torch.inf, -1e300))
    if student and classes == [1] and name in ("nkd", "wsld"):
        exact, limit = exact._replace(batch=NO_ONE), limit._replace(batch=NO_ONE)  # their task itself is of a label never said: infinite
    torch.testing.assert_close(method(*exact), method(*limit), rtol=1e-12, atol=0)
    assert total(method(*exact)).isfinite()
    for leaf, gradient in gradients(method, exact).items():
        torch.testing.assert_close(gradient, gradients(method, limit)[leaf], rtol=1e-9, atol=1e-12)


NO_ONE = replace(scene(EVEN).batch, labels=torch.tensor([0, 2, 3]))


@pytest.mark.parametrize("name", ["dkd", "nkd", "kd", "wsld", "mlkd", "wttm"])
def test_a_teacher_that_says_one_class_only_gives_finite_losses_and_gradients(name: str) -> None:
    """What the others are among themselves is not defined where they have nothing; it counts for nothing."""
    given = masked(scene(EVEN), [1, 2, 3, 4], -torch.inf)
    given = given._replace(batch=replace(given.batch, labels=torch.zeros(3, dtype=torch.long)))
    method = make(name, {}, EVEN).double()
    assert total(method(*given)).isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(method, given).values())


def test_kd_of_a_masked_class_by_hand() -> None:
    """Of p = (1/2, 1/2, 0) and q = (1/3, 1/3, 1/3): log 3/2 at temperature 1."""
    teacher = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert kd_loss(torch.zeros(1, 3), teacher, 1.0).item() == pytest.approx(0.4054651)
    assert kd_loss(teacher, torch.zeros(1, 3), 1.0).item() == torch.inf  # the student never says what the teacher does


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", PROBABILITIES)
def test_what_is_no_logit_is_not_hidden(name: str, broken: float) -> None:
    given = scene(EVEN)
    given.teacher.logits[0, 4] = broken
    assert not total(make(name, {}, EVEN).double()(*given)).isfinite()


@pytest.mark.parametrize(("name", "options"), ALL, ids=[label(*case) for case in ALL])
def test_what_is_no_number_is_not_hidden(name: str, options: dict[str, Any]) -> None:
    """One NaN, in whatever a method looks at, of either network: its loss is none."""
    pair = widest(name, options)
    method = make(name, options, pair).double()
    for role, taps in (("student", method.needs.student), ("teacher", method.needs.teacher)):
        for tap in taps:
            given = scene(pair)
            getattr(given, role).maps[tap][0, 0, 0, 0] = torch.nan
            assert total(method(*given)).isnan(), (role, tap)
    if method.needs.logits:
        given = scene(pair)
        given.teacher.logits[0, -1] = torch.nan
        assert total(method(*given)).isnan()
    for role, looks in (("student", "embedding" in wanted(method)), ("teacher", method.needs.embedding)):
        given = scene(pair)
        getattr(given, role).embedding[0, 0] = torch.nan
        assert total(method(*given)).isnan() == looks, role


def test_logits_are_standardised_over_the_classes_that_are_said() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, -torch.inf], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64).requires_grad_()
    found = standardise(logits)
    assert found[0].tolist() == pytest.approx([-1, 0, 1, -torch.inf], abs=1e-6)
    assert found[1, 0].item() == pytest.approx(-1.5 / (5 / 3) ** 0.5)
    (gradient,) = torch.autograd.grad(found[:, 0].sum(), logits)
    assert gradient.isfinite().all()
    assert gradient[0, 3] == 0
    alone = standardise(torch.tensor([[-torch.inf, 7.0, -torch.inf]]))
    assert alone.tolist() == [[-torch.inf, 0, -torch.inf]]
    assert standardise(torch.tensor([[1.0, torch.nan, 2.0]])).isnan().any()


@pytest.mark.parametrize("name", ["ls:kd", "ls:dkd", "ls:mlkd", "ls:ctkd", "ls:ttm", "ls:wttm"])
def test_standardised_methods_take_a_masked_teacher(name: str) -> None:
    given = masked(scene(EVEN), [4], -torch.inf)
    wrapped, plain = (
        make(name, {}, EVEN).double(),
        make(name.removeprefix("ls:"), {} if name.endswith(("ctkd", "tm")) else {"T": 2.0}, EVEN),
    )
    theirs = given.teacher.logits[:, :4]
    theirs = (theirs - theirs.mean(1, keepdim=True)) / (theirs.std(1, keepdim=True) + 1e-7)
    theirs = torch.cat([theirs, torch.full((3, 1), -torch.inf, dtype=torch.float64)], 1)
    ours = given.student.logits
    ours = (ours - ours.mean(1, keepdim=True)) / (ours.std(1, keepdim=True) + 1e-7)
    expected = plain.double()(Outputs(ours, ours), Outputs(theirs, theirs), given.batch)
    assert total(wrapped(*given)).item() == pytest.approx(total(expected).item(), rel=1e-9)
    given.student.logits.requires_grad_()
    total(wrapped(*given)).backward()
    assert given.student.logits.grad is not None
    assert given.student.logits.grad.isfinite().all()


def alike(outputs: Outputs, spread: float, seed: int) -> Outputs:
    """Samples 1 and 2 are sample 0, but for so much of its spread."""
    generator = torch.Generator().manual_seed(seed)

    def near(x: Tensor) -> Tensor:
        x = x.clone()
        for i in (1, 2):
            x[i] = x[0] + spread * x[0].std() * torch.randn(x[0].shape, generator=generator, dtype=x.dtype)
        return x

    return outputs._replace(embedding=near(outputs.embedding), maps={tap: near(m) for tap, m in outputs.maps.items()})


RELATIONS = [case for case in ALL if case[0] in ("rkd", "pkt", "cc", "irg", "itrd", "sp", "crd", "srd")]


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize("spread", [1e-3, 1e-5])
@pytest.mark.parametrize(("name", "options"), RELATIONS, ids=[label(*case) for case in RELATIONS])
def test_samples_nearly_alike_give_in_float32_what_they_give_in_float64(
    name: str, options: dict[str, Any], spread: float, who: str
) -> None:
    """As two copies of an image are, one of which has a pixel off by 1/255: float32 gives what float64 gives of the same numbers."""
    given = scene(EVEN, n=8)
    if who != "teacher":
        given = given._replace(student=alike(given.student, spread, 1))
    if who != "student":
        given = given._replace(teacher=alike(given.teacher, spread, 2))
    single = both(given, Tensor.float)
    double = both(single, Tensor.double)
    short, long = make(name, options, EVEN), make(name, options, EVEN).double()
    assert total(short(*single)).item() == pytest.approx(total(long(*double)).item(), rel=2e-5)
    found, expected = gradients(short, single), gradients(long, double)
    for leaf, gradient in expected.items():
        assert (found[leaf].double() - gradient).norm() <= 1e-3 * gradient.norm(), leaf


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
def test_angles_of_wide_embeddings_nearly_alike(spread: float) -> None:
    """After a ReLU, far from 0, as embeddings are."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.rand(16, 256, generator=generator) + 1 for _ in range(2))
    student[1:4] = student[0] + spread * torch.randn(3, 256, generator=generator)
    found, expected = (angle_loss(student.to(kind), teacher.to(kind)).item() for kind in (torch.float32, torch.float64))
    assert found == pytest.approx(expected, rel=1e-5)


def test_equal_samples_have_no_angle_and_pull_at_nothing() -> None:
    """Two of three are one point: of all triples none has an angle there but those at the third, whose cosine is 1."""
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss = angle_loss(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.abs().max() < 1
    same = angle_loss(student, student.detach())
    assert same == 0
    assert torch.autograd.grad(same, student)[0].abs().max() == 0


def scaled(outputs: Outputs, factor: float) -> Outputs:
    return outputs._replace(embedding=outputs.embedding * factor, maps={tap: m * factor for tap, m in outputs.maps.items()})


FREE_OF_SCALE = {  # method -> the sides whose scale is nothing to it; a student's that goes through a batch normalisation is to its epsilon
    "at": "both",
    "nst": "both",
    "sp": "both",
    "rkd": "both",
    "cc": "both",
    "cat_kd": "both",
    "kdsvd": "both",
    "ickd": "teacher",
    "ft": "none",
    "itrd": "teacher",
    "pefd": "teacher",
}
SIDES = {"both": ("student", "teacher"), "teacher": ("teacher",), "none": ()}


@pytest.mark.parametrize("factor", [1e-8, 1e-6, 1e-4, 1e3, 1e5])
@pytest.mark.parametrize("name", FREE_OF_SCALE)
def test_the_scale_of_a_map_is_nothing_to_what_compares_directions(name: str, factor: float) -> None:
    method, given = make(name, {}, EVEN), both(scene(EVEN, n=6), Tensor.float)
    usual = total(method(*given))
    for side in SIDES[FREE_OF_SCALE[name]]:
        other = given._replace(**{side: scaled(getattr(given, side), factor)})
        torch.testing.assert_close(total(method(*other)), usual, rtol=2e-5, atol=0)
        if side == "student":
            found, expected = gradients(method, other), gradients(method, given)
            for leaf, gradient in expected.items():  # of a smaller map the larger
                assert (found[leaf] * factor - gradient).norm() <= 2e-3 * gradient.norm(), leaf


@pytest.mark.parametrize("name", ["sp", "nst", "at", "cc", "rkd", "cat_kd"])
def test_what_float32_can_not_hold_is_not_taken_for_zeros(name: str) -> None:
    """The square of 1e30 is infinite, and a map over that is 0: a finite loss of nothing."""
    method, given = make(name, {}, EVEN), both(scene(EVEN), Tensor.float)
    assert not total(method(*given._replace(student=scaled(given.student, 1e30)))).isfinite()


@pytest.mark.parametrize("name", [*PROBABILITIES, "dml", "ls:kd", "ls:dkd", "ls:logits", "tf_kd"])
def test_a_single_class_is_refused_when_the_method_is_built(name: str) -> None:
    one = network("small", classes=1)
    with pytest.raises(ValueError, match=rf"^{name}: small has one class, .*; choose other data$"):
        make(name, {}, (one, one))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("base", *PROBABILITIES, "dml", "tf_kd", "crd")])
def test_methods_without_probabilities_take_a_single_class(name: str) -> None:
    pair = tuple(replace(spec, classes=1, taps=tuple(replace(t, channels=1) if t.name == "cam" else t for t in spec.taps)) for spec in EVEN)
    given = scene(pair)
    given = given._replace(batch=replace(given.batch, labels=torch.zeros(3, dtype=torch.long)))
    assert total(make(name, {}, pair).double()(*given)).isfinite()


@pytest.mark.parametrize("name", [*PROBABILITIES, "dml", "ls:kd", "ls:dkd", "tf_kd"])
def test_two_classes_are_enough(name: str) -> None:
    pair = tuple(replace(spec, classes=2) for spec in EVEN)
    given = scene(pair)
    given = given._replace(batch=replace(given.batch, labels=torch.tensor([0, 1, 1])))
    method = make(name, {}, pair).double()
    assert total(method(*given)).isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(method, given).values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_maps_that_are_not_finite_give_kdsvd_a_loss_that_is_not_and_no_traceback(value: float) -> None:
    """No decomposition takes them."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 3, 4, 4, generator=generator) for _ in range(2)]
    broken = [maps[0].clone(), maps[1]]
    broken[0][1, 1, 2, 2] = value
    assert not kdsvd_loss(broken, maps).isfinite()
    assert not kdsvd_loss(maps, broken).isfinite()


def second(name: str, student: str, teacher: str) -> Method:
    return build(resolve(name, {}, {}), student=models.spec(student, CIFAR100), teacher=models.spec(teacher, CIFAR100), data=CIFAR100)


@pytest.mark.parametrize(
    ("teacher", "student", "theirs", "ours", "version"),
    [  # the shapes at index 2 of what RepDistiller's networks give: stem, stage 1, stage 2, ...
        ("wrn-40-2", "wrn-16-2", "64x16x16", "64x16x16", 1),
        ("wrn-40-2", "wrn-40-1", "64x16x16", "32x16x16", 1),
        ("resnet56", "resnet20", "32x16x16", "32x16x16", 1),
        ("resnet110", "resnet20", "32x16x16", "32x16x16", 1),
        ("resnet110", "resnet32", "32x16x16", "32x16x16", 1),
        ("resnet32x4", "resnet8x4", "128x16x16", "128x16x16", 1),
        ("vgg13", "vgg8", "256x8x8", "256x8x8", 2),
        ("vgg13", "mobilenetv2", "256x8x8", "16x8x8", 2),
        ("resnet50", "mobilenetv2", "512x16x16", "16x8x8", 2),
        ("resnet50", "vgg8", "512x16x16", "256x8x8", 2),
        ("resnet32x4", "shufflenetv1", "128x16x16", "480x8x8", 1),
        ("resnet32x4", "shufflenetv2", "128x16x16", "232x8x8", 1),
        ("wrn-40-2", "shufflenetv1", "64x16x16", "480x8x8", 1),
    ],
)
def test_the_hint_is_the_one_of_the_benchmark(teacher: str, student: str, theirs: str, ours: str, version: int) -> None:
    """Where it was another before, on networks of four stages, the version is another too, and only there."""
    method = second("fitnets", student, teacher)
    (tap,) = method.needs.teacher
    assert method.needs.student == {tap}
    assert (models.spec(teacher, CIFAR100).tap(tap).shape, models.spec(student, CIFAR100).tap(tap).shape) == (theirs, ours)
    assert method.versions == {"fitnets": version}
    assert second("fitnets+kd", student, teacher).versions == {"fitnets": version, "kd": 1}


def staged(count: int) -> NetSpec:
    return network(f"of{count}", (2,) * (count + 1), tuple((2 ** (count - i), 2 ** (count - i)) for i in range(count + 1)))


@pytest.mark.parametrize(
    ("count", "stage", "version"), [(1, "stage1", 1), (2, "stage2", 1), (3, "stage2", 1), (4, "stage2", 2), (5, "stage2", 2)]
)
def test_the_hint_is_the_second_stage_or_the_only_one(count: int, stage: str, version: int) -> None:
    method = get("fitnets")(student=staged(count), teacher=staged(count))
    assert (method.needs.student, method.versions["fitnets"]) == ({stage}, version)


@pytest.mark.parametrize(("name", "wanted"), [("ab", "stage1.post"), ("ickd", "stage3.post"), ("srrl", "stage3.post"), ("at", "stage1")])
def test_what_wants_a_map_after_its_relu_finds_it_in_a_wrn(name: str, wanted: str) -> None:
    method = second(name, "wrn-16-2", "wrn-40-2")
    assert wanted in method.needs.student
    assert not method.needs.student & {"stage3.post" if name == "at" else "stage3"}
    same = second(name, "resnet20", "resnet56")
    assert {tap for tap in same.needs.student | same.needs.teacher if tap.endswith(".post")} == set()


def test_simkd_learns_the_map_that_feeds_a_wrns_classifier() -> None:
    spec, teacher = models.spec("reused(wrn-16-2,wrn-40-2,2)", CIFAR100), models.spec("wrn-40-2", CIFAR100)
    method = get("simkd")(student=spec, teacher=teacher)
    assert method.needs.teacher == {"stage3.post"}
    net = models.build("wrn-40-2", CIFAR100, taps=("stage3.post",)).eval()
    out = net(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(out.embedding, out.maps["stage3.post"].mean((2, 3)))
    batch = Batch(torch.zeros(2, dtype=torch.long))
    ours = Outputs(out.logits, out.embedding, {"projected": out.maps["stage3.post"]})
    assert method(ours, out, batch)["simkd"] == 0
