"""The learning rate of every step equals that of torch's schedulers."""

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, OneCycleLR

from flowdistill import methods, models
from flowdistill.config import TrainConfig
from flowdistill.methods import Phase
from flowdistill.training.schedule import lr_factor
from flowdistill.training.student import Student
from flowdistill.types import DataSpec

LR = 0.1


def student(schedule: str, lr: float = LR, phase: Phase | None = None, **train) -> Student:
    resolved = methods.resolve("base", {}, {})
    data = DataSpec("some", 64, 2, 1, 8, 8)
    spec = models.spec("resnet8", data)
    method = methods.build(resolved, student=spec, teacher=spec, data=data)
    made = Student(models.build("resnet8", data), method, resolved, TrainConfig(schedule=schedule, lr=lr, **train))
    made.begin_phase(0)
    made.phase = phase or made.phase
    return made


def rates(schedule: str, epochs: int, steps: int, **own) -> list[float]:
    """The rate of every step of a phase, as training asks for it."""
    made = student(schedule, **own)
    return [made.learning_rate(epoch, epochs, step, steps) for epoch in range(epochs) for step in range(steps)]


def torchs(total: int, scheduler: type[LRScheduler], **options) -> list[float]:
    """The rates that a torch scheduler sets for ``total`` steps."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    made = scheduler(optimizer, **options)
    found = []
    for step in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            made.step()
    return found


@pytest.mark.parametrize(
    ("epoch", "lr"), [(1, 0.1), (100, 0.1), (101, 0.01), (102, 0.01), (150, 0.01), (151, 0.001), (152, 0.001), (200, 0.001)]
)
def test_step_of_the_reference_log(epoch, lr):
    """Epochs counted from 1, as people do: the 101st of 200 is the first at 0.01, the 151st the first at 0.001."""
    assert LR * lr_factor("step", step=epoch - 1, steps=200, epoch_share=(epoch - 1) / 200) == pytest.approx(lr)
    made = student("step")
    assert [made.learning_rate(epoch - 1, 200, step, 390) for step in (0, 1, 389)] == pytest.approx([lr] * 3)


def test_step_equals_multi_step_lr():
    assert rates("step", 200, 1) == pytest.approx(torchs(200, MultiStepLR, milestones=[100, 150], gamma=0.1))


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 7, 30, 101])
def test_step_of_any_length_changes_at_the_first_epoch_past_each_half_and_three_quarters(epochs):
    milestones = [-(-epochs // 2), -(-epochs * 3 // 4)]
    assert rates("step", epochs, 1) == pytest.approx(torchs(epochs, MultiStepLR, milestones=milestones, gamma=0.1))


def test_step_changes_between_epochs_only():
    found = rates("step", 5, 7)
    assert all(len(set(found[start : start + 7])) == 1 for start in range(0, 35, 7))


@pytest.mark.parametrize(("epochs", "changes"), [(50, (31, 41)), (100, (61, 81)), (40, (25, 33)), (5, (4, 5))])
def test_custom_milestones(epochs, changes):
    """Shares .6 and .8 of the phase, counted from 1: of 50 epochs the 31st and the 41st are the first lower ones."""
    found = rates("step", epochs, 1, phase=Phase("first", milestones=(0.6, 0.8)))
    assert tuple(i + 1 for i in range(1, epochs) if found[i] < found[i - 1]) == changes
    assert [found[0], found[changes[0] - 1], found[changes[1] - 1]] == pytest.approx([0.1, 0.01, 0.001])


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_milestones_of_a_phase_come_before_the_recipes_schedule(schedule):
    own = Phase("first", lr=0.5, milestones=(0.6, 0.8))
    assert rates(schedule, 10, 2, phase=own) == pytest.approx([0.5] * 12 + [0.05] * 4 + [0.005] * 4)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 10), (10, 1), (4, 25), (7, 390)])
def test_cosine_equals_cosine_annealing_lr_at_every_step(epochs, steps):
    total = epochs * steps
    assert rates("cosine", epochs, steps) == pytest.approx(torchs(total, CosineAnnealingLR, T_max=total), abs=1e-9)


def test_milestones_of_the_recipe():
    found = rates("step", 8, 1, milestones=(0.25, 0.5, 0.75))
    assert found == pytest.approx([LR] * 2 + [LR / 10] * 2 + [LR / 100] * 2 + [LR / 1000] * 2)


@pytest.mark.parametrize("schedule", ["step", "cosine", "one-cycle"])
def test_warm_up_epochs_are_at_a_tenth_and_change_no_later_one(schedule):
    plain, warm = rates(schedule, 8, 3), rates(schedule, 8, 3, warmup_epochs=2)
    assert warm[:6] == pytest.approx([LR / 10] * 6)
    assert warm[6:] == plain[6:]


@pytest.mark.parametrize("schedule", ["step", "cosine", "one-cycle"])
def test_a_warm_up_in_steps_rises_evenly_to_the_rate_and_changes_no_later_one(schedule):
    """Over a border between epochs; the first step has a part of the rate, the last of the warm-up all of it."""
    plain, warm = rates(schedule, 8, 3), rates(schedule, 8, 3, warmup_steps=5)
    assert warm[:5] == pytest.approx([LR / 5, 2 * LR / 5, 3 * LR / 5, 4 * LR / 5, LR])
    assert warm[5:] == plain[5:]
    own = Phase("first", lr=0.5, milestones=(0.6, 0.8))
    assert rates(schedule, 10, 2, phase=own, warmup_steps=5) == rates(schedule, 10, 2, phase=own)


def test_cosine_ends_at_zero():
    assert lr_factor("cosine", step=8, steps=8, epoch_share=1.0) == pytest.approx(0)
    assert lr_factor("cosine", step=4, steps=8, epoch_share=0.5) == pytest.approx(0.5)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 10), (10, 1), (5, 10), (4, 25), (2, 390), (30, 7)])
def test_one_cycle_equals_one_cycle_lr_at_every_step(epochs, steps):
    total = epochs * steps
    assert rates("one-cycle", epochs, steps) == pytest.approx(torchs(total, OneCycleLR, max_lr=LR, total_steps=total), abs=1e-9)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)])
@pytest.mark.parametrize("schedule", ["step", "cosine", "one-cycle"])
def test_the_shortest_trainings_have_a_rate(schedule, epochs, steps):
    assert all(0 < rate <= LR for rate in rates(schedule, epochs, steps))


@pytest.mark.parametrize("schedule", ["step", "cosine", "one-cycle"])
def test_rate_scales_with_the_base_rate(schedule):
    assert rates(schedule, 8, 3, lr=0.02) == pytest.approx([rate / 5 for rate in rates(schedule, 8, 3)])
