"""Several teachers: the mean of their logits, a term for each on features, each asked once; what they are is on record and comes back."""

from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.command import command
from helpers.interruptions import STEPS, cut_off
from helpers.small import config
from torch import Tensor

from flowdistill import methods, models
from flowdistill.checks import UserError
from flowdistill.config import RunConfig, each_network
from flowdistill.data.batches import DeviceData
from flowdistill.ledger import Ledger, Run
from flowdistill.ledger.merge import merge
from flowdistill.methods import Needs
from flowdistill.models.joined import Joined, joined_spec, student_of
from flowdistill.randomness import seeded
from flowdistill.report import tables
from flowdistill.runner import Watcher, card, run
from flowdistill.runner.doctor import examine
from flowdistill.runner.plan import plan
from flowdistill.runner.several import SHARE, Several
from flowdistill.training.joining import best_shares
from flowdistill.training.teacher import Teacher
from flowdistill.types import Batch, DataSpec, MethodContext, NetSpec, Outputs, numbered

CPU = torch.device("cpu")
DATA = DataSpec("some", 100, 10, 1, 8, 8)
NAMES = ("resnet8x4", "resnet14")  # embeddings of 256 and 64
TAPS = ("stem", "stage1", "stage2", "stage3", "stage1.first", "stage2.first", "stage3.first", "stage1.pre", "stage2.pre", "stage3.pre")
ALONE = {"irg", "srrl"}  # they use a teacher's logits beside its features
METHODS = [
    name for name in methods.METHODS if methods.get(name).uses_teacher and not methods.get(name).mutual and name not in ALONE | {"simkd"}
]


def nets(taps: tuple[str, ...] = TAPS) -> list[models.Network]:
    """Two networks with batch statistics as of trained ones."""
    made = [models.build(name, DATA, taps=taps, seed=seed) for seed, name in enumerate(NAMES)]
    with torch.no_grad():
        for net in made:
            for _ in range(3):
                net(torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(7)))
    return [net.eval() for net in made]


def images(count: int = 6) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def test_it_answers_by_the_weighted_mean_of_the_logits() -> None:
    parts = nets()
    with torch.no_grad():
        outputs, of_each = Joined(parts, (0.75, 0.25))(images()), [net(images()) for net in parts]
    wanted = 0.75 * of_each[0].logits.numpy() + 0.25 * of_each[1].logits.numpy()
    np.testing.assert_allclose(outputs.logits.numpy(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(outputs.embedding, torch.cat([each.embedding for each in of_each], 1))
    assert set(outputs.maps) == {f"{tap}@{number}" for tap in TAPS for number in (1, 2)}
    for tap, (number, each) in itertools.product(TAPS, enumerate(of_each, 1)):
        assert torch.equal(outputs.maps[f"{tap}@{number}"], each.maps[tap])


def test_a_teacher_without_a_share_counts_for_nothing() -> None:
    """Even one that rules classes out by -inf, where 0 times it would be no number."""
    parts = nets()
    torch.nn.init.constant_(parts[1].fc.bias, -torch.inf)  # type: ignore[arg-type, union-attr]
    with torch.no_grad():
        assert torch.equal(Joined(parts, (1.0, 0.0))(images()).logits, parts[0](images()).logits)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_made_cheap_it_answers_the_same(precision: Any) -> None:
    """It is traced through, and what no method needs is left out of each of its networks."""
    joined = Joined(nets(), (0.5, 0.5))
    plain = Teacher(joined, Needs(), precision)
    plain.net = joined
    cheap = Teacher(Joined(nets(), (0.5, 0.5)), Needs(teacher=frozenset({"stage2@2"}), logits=True), precision)
    assert cheap.whole == ""
    few = Teacher(Joined(nets(), (0.5, 0.5)), Needs(teacher=frozenset({"stage1@1"})), precision)
    assert sum(p.numel() for p in few.net.parameters()) < 0.2 * sum(p.numel() for p in cheap.net.parameters())
    ours, theirs = cheap.teach(images()), plain.teach(images())
    assert set(ours.maps) == {"stage2@2"}
    atol = 1e-4 if precision == "fp32" else 0.05
    torch.testing.assert_close(ours.logits.float(), theirs.logits.float(), atol=atol, rtol=0.02)
    torch.testing.assert_close(ours.maps["stage2@2"].float(), theirs.maps["stage2@2"].float(), atol=atol, rtol=0.05)


def outputs_of(spec: NetSpec, seed: int) -> Outputs:
    """Made-up outputs of a network."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    maps = {tap.name: drawn(8, tap.channels, tap.height, tap.width) for tap in spec.taps}
    return Outputs(drawn(8, spec.classes), drawn(8, spec.embedding), maps)


def together(of_each: list[Outputs]) -> dict[str, Tensor]:
    return {numbered(tap, number): value for number, each in enumerate(of_each, 1) for tap, value in each.maps.items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_terms_that_it_has_with_each_alone(name: str) -> None:
    """On logits: the terms with a teacher of the mean logits. On features: those with each teacher, under its number."""
    wide = name != "kdsvd"  # it wants equal channels
    student_spec, specs = (
        models.spec("resnet8", DATA),
        [models.spec(teacher, DATA) for teacher in (NAMES if wide else ("resnet8", "resnet14"))],
    )
    student, of_each = outputs_of(student_spec, 1), [outputs_of(spec, seed) for seed, spec in enumerate(specs, 2)]
    shares = (0.25, 0.75)
    mean = torch.stack([share * each.logits for share, each in zip(shares, of_each, strict=True)]).sum(0)
    joined = Outputs(mean, torch.cat([each.embedding for each in of_each], 1), together(of_each))
    options = {"crd": {"negatives": 20, "dim": 8}, "seed_kd": {"queue": 16}, "fsp": {"adapter": "conv1x1"}}
    given = {name: options[name]} if name in options else {}
    batch = Batch(torch.arange(8), torch.arange(8), torch.tensor(0))
    context = MethodContext(
        norms={f"stage{n}.pre@{k}": (torch.full((c,), float(k)), torch.full((c,), n / 10)) for n, k, c in norms()},
        class_means=torch.randn(10, 320, generator=torch.Generator().manual_seed(9)),
        labels=torch.arange(100) % 10,
    )
    resolved = methods.resolve(name, given, {}, teachers=2)
    with seeded(0, "adapters"):
        both = methods.build(resolved, student=student_of([student_spec] * 2), teacher=joined_spec(specs), data=DATA)
    both.setup(context)
    on_logits = methods.get(name).kind == "logits"
    began = [{key: value.clone() for key, value in part.state_dict().items()} for part in ([both] * 2 if on_logits else own_parts(both))]
    all_maps = student._replace(maps=together([student] * 2))
    with seeded(1, "what it draws"):
        found = both(all_maps, joined, batch)
    assert set(found) == set(both.terms) <= set(resolved.weights)
    for number, (spec, each, state) in enumerate(zip(specs, of_each, began, strict=True), 1):
        alone = methods.build(methods.resolve(name, given, {}), student=student_spec, teacher=spec, data=DATA)
        start = 0 if number == 1 else specs[0].embedding
        own_norms = {f"stage{n}.pre": context.norms[f"stage{n}.pre@{k}"] for n, k, _ in norms() if k == number}
        assert context.class_means is not None
        own_means = context.class_means[:, start : start + spec.embedding]
        alone.setup(MethodContext(norms=own_norms, class_means=own_means, labels=context.labels))
        alone.load_state_dict(state)
        if on_logits:
            assert set(found) == set(alone.terms), "one term by the mean, none for each"
            wanted = alone(student, each._replace(logits=mean), batch)
        else:
            with seeded(1, "what it draws"):
                if number == 2:
                    both.methods[0](all_maps, joined, batch)  # type: ignore[index, operator, union-attr]  # it draws before the second
                wanted = {numbered(term, number): value for term, value in alone(student, each, batch).items()}
        for term, value in wanted.items():
            torch.testing.assert_close(found[term], value, msg=lambda why, term=term: f"{term}: {why}")


def own_parts(both: methods.Method) -> list[methods.Method]:
    """The method itself, for each teacher."""
    return [part.method for part in both.methods]  # type: ignore[union-attr]


def norms() -> list[tuple[int, int, int]]:
    """Stage, teacher and channels."""
    return [(stage, number, 16 * 2 ** (stage - 1) * (4 if number == 1 else 1)) for stage in (1, 2, 3) for number in (1, 2)]


def test_weights_are_shared_or_set_for_one() -> None:
    def weights(given: dict[str, float], name: str = "at+kd", teachers: int = 2) -> dict[str, float]:
        return methods.resolve(name, {}, given, teachers).weights

    assert weights({}) == {"task": 1, "at@1": 500, "at@2": 500, "kd": 1}
    assert weights({"at": 10}) == {"task": 1, "at@1": 5, "at@2": 5, "kd": 1}
    assert weights({"at": 10, "at@2": 7}) == {"task": 1, "at@1": 5, "at@2": 7, "kd": 1}
    assert weights(weights({"at@1": 3})) == weights({"at@1": 3}), "what a run records gives the same again"
    assert weights({}, teachers=1) == {"task": 1, "at": 1000, "kd": 1}
    with pytest.raises(UserError, match=r"weights.at@3: method 'at\+kd' has no such term"):
        weights({"at@3": 1})
    with pytest.raises(UserError, match=r"weights.kd@1: method 'at\+kd' has no such term"):
        weights({"kd@1": 1})


def test_stages_of_training_count_each_term() -> None:
    two_stages = methods.resolve("fsp", {"fsp": {"schedule": "two-stage"}}, {}, 2)
    assert [set(two_stages.counted(phase)) for phase in two_stages.phases] == [{"fsp@1", "fsp@2"}, {"task"}]


@pytest.fixture
def taught(ledger: Ledger, small_npz: Path) -> Ledger:
    return with_teachers(ledger, small_npz)


def with_teachers(ledger: Ledger, small_npz: Path) -> Ledger:
    """The ledger with teachers of two architectures in it."""
    for keys in ({"student": "resnet14", "seed": 9}, {"student": "resnet8x4", "seed": 8}):
        run([config(small_npz, **keys)], ledger, CPU)  # type: ignore[arg-type]
    return ledger


def several(small_npz: Path, **keys: Any) -> RunConfig:
    return config(small_npz, **{"method": "at+kd", "teacher": "1+2", "weights": {"at": 20.0}, **keys})


def test_a_run_knows_its_teachers(taught: Ledger, small_npz: Path) -> None:
    told: list[str] = []

    class Listens(Watcher):
        def say(self, line: str) -> None:
            told.append(line)

    (done,) = run([several(small_npz)], taught, CPU, watcher=Listens())
    assert (done.teacher, done.teacher_run, done.config["teacher"]) == ("resnet14+resnet8x4", None, "1+2")
    assert {role: network.get(SHARE) for role, network in (done.networks or {}).items()} == {
        "student": None,
        "teacher": 0.5,
        "teacher 2": 0.5,
    }
    assert set(taught.epochs(done.no)[-1].terms) == {"task", "at@1", "at@2", "kd"}
    right, alone, alike = answers(taught, small_npz)
    assert done.teacher_accuracy == pytest.approx(right)
    line = next(line for line in told if line.startswith("teacher"))
    assert line == (
        f"teacher resnet14+resnet8x4 (run 1 + run 2): {right:.2f} % of the test images by the mean of their logits (shares 0.5, 0.5); "
        f"alone {alone[0]:.2f} %, {alone[1]:.2f} %; all give the same class for {alike:.2f} %"
    )
    (row,) = [row for row in tables.summary_rows(taught.runs(), "last") if row["method"] == "at+kd"]
    assert (row["pair"], row["teachers"]) == ("ResNet14+ResNet8x4>>8", "2 together")
    measured = card.measure(done.no, taught, CPU)
    assert measured.columns[0].parameters == sum(taught.run(no).parameters for no in (1, 2))
    assert measured.columns[0].score is not None
    assert 100 * measured.columns[0].score.correct / sum(measured.class_images) == pytest.approx(right)


def test_the_doctor_looks_at_each_and_at_both(taught: Ledger, small_npz: Path) -> None:
    findings = examine([several(small_npz)], taught, CPU)
    right, alone, alike = answers(taught, small_npz)
    together = next(finding for finding in findings if finding.check == "teachers together")
    assert together.verdict == ("ok" if right >= max(alone) else "look")
    assert together.found == (
        f"resnet14+resnet8x4: {right:.2f} % of 150 test images by the mean of their logits (shares 0.5, 0.5); alone {alone[0]:.2f} %, "
        f"{alone[1]:.2f} %; all give the same class for {alike:.2f} %"
    )
    assert [finding.found.split(":")[0] for finding in findings if finding.check == "teacher"] == ["resnet14 (run 1)", "resnet8x4 (run 2)"]
    assert {finding.check for finding in findings} > {"at+kd: at@1", "at+kd: at@2", "at+kd: kd"}


def answers(ledger: Ledger, small_npz: Path) -> tuple[float, list[float], float]:
    """The accuracy of the mean, of each alone, and how often they agree, in percent: computed here from the runs' files."""
    (job,) = plan([several(small_npz)], ledger, CPU)
    assert isinstance(job.teacher, Several)
    data = DeviceData(job.data, "full", CPU)
    nets = [one.build(data.spec, given=data.normalisation).eval() for one in job.teacher.each]
    with torch.no_grad():
        logits = np.stack([net(data.normalise(data.test.images)).logits.numpy() for net in nets])
    labels, classes = data.test.labels.numpy(), logits.argmax(2)
    mean = 100 * (logits.mean(0).argmax(1) == labels).mean()
    return mean, [100 * (each == labels).mean() for each in classes], 100 * (classes[0] == classes[1]).mean()


def test_each_is_asked_once_for_a_batch(taught: Ledger, small_npz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many students and terms there are."""
    counted: list[int] = []
    plain = Teacher.teach

    def teach(self: Teacher, given: Tensor) -> Outputs:
        counted.append(len(given))
        return plain(self, given)

    monkeypatch.setattr(Teacher, "teach", teach)
    run([several(small_npz, method=method, weights={}, train={"epochs": 1}) for method in ("kd", "at", "rkd")], taught, CPU)
    assert len(counted) == STEPS + 1, "one more before the first step"


def test_resumed_is_straight_bit_for_bit(taught: Ledger, small_npz: Path) -> None:
    for number in (1, 2):
        run([config(small_npz, student="resnet14", seed=number + 10, split="holdout", train={"epochs": number})], taught, CPU)
    chosen = several(
        small_npz, method="kd+fitnets", teacher="3+4", split="holdout", teacher_shares="holdout", weights={}, train={"epochs": 4}
    )
    (cut,) = cut_off([chosen], taught, 2 * STEPS)
    (resumed,) = run([chosen], taught, CPU)
    assert (resumed.no, resumed.resumed) == (cut.no, 1)
    (straight,) = run([chosen], taught, CPU, again=True)
    assert resumed.weights_hash == straight.weights_hash
    assert [epoch.terms for epoch in taught.epochs(resumed.no)] == [epoch.terms for epoch in taught.epochs(straight.no)]
    assert shares_of(resumed) == shares_of(straight) == pytest.approx(best_of_grid(chosen, taught), abs=0.006)
    assert "teacher_shares=holdout" in resumed.variant
    mean = plan([several(small_npz, teacher="3+4", split="holdout", teacher_shares=how) for how in ("mean", "holdout")], taught, CPU)
    assert mean[0].fingerprint != mean[1].fingerprint


def best_of_grid(chosen: RunConfig, ledger: Ledger) -> list[float]:
    """The shares of two teachers that have the least cross-entropy on the held-out images, to a hundredth."""
    (job,) = plan([chosen], ledger, CPU)
    assert job.teacher is not None
    data = DeviceData(job.data, "holdout", CPU)
    ((given, labels),) = data.epoch_images.batches()
    with torch.no_grad():
        one, two = (each.build(data.spec, given=data.normalisation).eval()(given).logits for each in job.teacher.each)
    share = min(
        (step / 100 for step in range(101)), key=lambda share: float(F.cross_entropy(share * one + (1 - share) * two, labels.long()))
    )
    return [share, 1 - share]


def shares_of(done: Run) -> list[float]:
    return [network[SHARE] for role, network in (done.networks or {}).items() if role != "student"]


def test_the_best_shares_are_the_best() -> None:
    """Held to all shares of a grid; one that guesses gets none."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (300,), generator=generator)
    right = 3.0 * F.one_hot(labels, 4).double()
    logits = torch.stack([scale * right + 2 * torch.randn(300, 4, generator=generator, dtype=torch.float64) for scale in (1.0, 0.5, 0.0)])
    best = best_shares(logits, labels)

    def loss(shares: Tensor) -> float:
        return float(F.cross_entropy((shares[:, None, None] * logits).sum(0), labels))

    steps = torch.linspace(0, 1, 41, dtype=torch.float64)
    grid = [torch.tensor([a, b, 1 - a - b], dtype=torch.float64) for a in steps for b in steps if a + b <= 1 + 1e-9]
    assert loss(best) <= min(loss(shares.clamp(min=0)) for shares in grid) + 1e-6
    assert best.sum() == pytest.approx(1)
    assert best[0] > best[1] > best[2]


def test_other_teachers_are_another_run(taught: Ledger, small_npz: Path) -> None:
    configs = [several(small_npz, method="kd", teacher=teacher, weights={}) for teacher in ("1", "2", "1+2")]
    assert len({job.fingerprint for job in plan(configs, taught, CPU)}) == 3


def test_shares_that_no_method_asks_for_are_left_out(taught: Ledger, small_npz: Path) -> None:
    run([config(small_npz, student="resnet14", seed=seed, split="holdout", train={"epochs": 1}) for seed in (11, 12)], taught, CPU)
    configs = [
        several(small_npz, method="rkd", teacher="3+4", split="holdout", teacher_shares=how, weights={}) for how in ("mean", "holdout")
    ]
    mean, chosen = plan(configs, taught, CPU)
    assert (mean.fingerprint, mean.variant) == (chosen.fingerprint, chosen.variant)


def test_merged_they_have_their_new_numbers(ledger: Ledger, small_npz: Path, tmp_path: Path) -> None:
    taught = with_teachers(ledger, small_npz)
    run([several(small_npz, train={"epochs": 1})], taught, CPU)
    with closing(Ledger(tmp_path / "first", create=True)) as first:
        run([config(small_npz, seed=77, train={"epochs": 1})], first, CPU)
    merge([tmp_path / "first", taught.folder], tmp_path / "both")
    with closing(Ledger(tmp_path / "both")) as both:
        assert [(one.no, one.config["teacher"]) for one in both.runs() if one.teacher != "-"] == [(4, "2+3")]
        again = run([RunConfig.model_validate(both.run(4).config)], both, CPU)
        assert again[0].no == 4, "it is known again"


def test_a_comma_separates_and_a_plus_joins(taught: Ledger, small_npz: Path, tmp_path: Path) -> None:
    words = ("distill", "--method", "base,kd", "--student", "resnet8", "--dataset", f"npz:{small_npz}", "--epochs", "1", "--seeds", "0")
    words = (*words, "--runs", str(taught.folder), "--set", "train.precision=fp32")
    said = command(tmp_path, *words, "--teacher", "1,1+2")
    assert said.code == 0, said.err
    assert sorted((one.method, one.teacher) for one in taught.runs()[2:]) == [
        ("base", "-"),
        ("kd", "resnet14"),
        ("kd", "resnet14+resnet8x4"),
    ]
    assert command(tmp_path, *words, "--teacher", "1,1").err.endswith("--teacher 1,1 names a teacher twice; each has its own runs\n")


def test_a_file_whose_name_has_a_plus_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a+b").mkdir()
    Path("a+b/net.py").write_text("")
    Path("c+d.pt").write_text("")
    for one in ("a+b/net.py:Net", "c+d.pt", "resnet8@c+d.pt", "a+b/net.py:Net@c+d.pt#ema", "1+", "+1", "resnet20"):
        assert each_network(one) == [one]
    assert each_network("1+2+timm:resnet18.a1_in1k") == ["1", "2", "timm:resnet18.a1_in1k"]


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"teacher": "1+1"}, "teacher=1+1 names 1 twice; name each once"),
        ({"teacher": "1+FILE"}, "teacher 1+FILE: run 1 and FILE are the same network; name each once"),
        (
            {"teacher": "1+resnet14"},
            "teacher 1+resnet14: resnet14 is the name of a model, and does not say which of its runs; write the run whose network it is, a "
            "weights file, or published weights in its place, or --teacher resnet14 alone",
        ),
        (
            {"teacher": "1", "teacher_shares": "holdout"},
            "teacher_shares=holdout: 1 is not several; join several by a plus (1+2), or leave it out",
        ),
        (
            {"teacher_shares": "holdout"},
            "teacher_shares=holdout: nothing is held out; add --holdout (split=holdout), or set teacher_shares=mean",
        ),
        (
            {"inputs": {"teacher": {"size": 8}}},
            "inputs.teacher is of one network, and teacher=1+2 names 2; leave it out, or name one teacher",
        ),
        (
            {"method": "irg", "weights": {}},
            "irg: it uses the logits of each teacher beside its features, and resnet14+resnet8x4 gives the mean of its logits alone; name "
            "one teacher, or use another method, such as at or kd",
        ),
        (
            {"method": "simkd", "weights": {}},
            "simkd builds its network of one teacher, and resnet14 and resnet8x4 are several; name one",
        ),
        (
            {"teacher": "1+OTHER"},
            "teacher 1+OTHER: run 1 and OTHER have 10 classes and 7; join teachers of the same classes, or give each a classifier for the "
            "data's by --probe",
        ),
        (
            {"split": "holdout"},
            "run 1 was trained on all of train, the held-out images among them; a holdout run takes networks of holdout runs (train one "
            "with --holdout)",
        ),
    ],
)
def test_what_cannot_be_is_one_line(taught: Ledger, small_npz: Path, tmp_path: Path, keys: dict[str, Any], line: str) -> None:
    torch.save(models.build("resnet8", DataSpec("other", 100, 7, 1, 8, 8), seed=1).state_dict(), tmp_path / "seven.pt")
    files = {"FILE": str(taught.run_folder(1) / "student.safetensors"), "OTHER": f"resnet8@{tmp_path / 'seven.pt'}"}
    said = {"FILE": files["FILE"], "OTHER": str(tmp_path / "seven.pt")}
    teacher = keys.get("teacher", "1+2")
    for name, file in files.items():
        teacher, line = teacher.replace(name, file), line.replace(f"1+{name}", f"1+{file}").replace(name, said[name])
    with pytest.raises((UserError, ValueError)) as error:
        plan([several(small_npz, **{**keys, "teacher": teacher})], taught, CPU)
    assert str(error.value) == line


def test_a_probe_for_each(taught: Ledger, small_npz: Path, tmp_path: Path) -> None:
    """A teacher of other classes joins by a classifier of its own for the data's; the card knows both again."""
    torch.save(models.build("resnet8", DataSpec("other", 100, 7, 1, 8, 8), seed=1).state_dict(), tmp_path / "seven.pt")
    (done,) = run([several(small_npz, teacher=f"1+resnet8@{tmp_path / 'seven.pt'}", probe=True, train={"epochs": 1})], taught, CPU)
    measured = card.measure(done.no, taught, CPU)
    assert measured.columns[0].score is not None
    assert 100 * measured.columns[0].score.correct / sum(measured.class_images) == pytest.approx(done.teacher_accuracy)
