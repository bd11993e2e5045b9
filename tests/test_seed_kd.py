"""seed_kd's queue of the teacher's embeddings."""

from __future__ import annotations

import pytest
import torch
from helpers.pairs import PAIRS
from helpers.scenes import draw, scene
from torch import Tensor

from flowdistill.methods.seed_kd import SEED
from flowdistill.randomness import seeded
from flowdistill.types import DataSpec, Outputs

STUDENT, TEACHER = PAIRS["wide embedding"]


def a_method(queue: int, images: int = 50, seed: int = 0) -> SEED:
    data = DataSpec("tiny", n_train=images, classes=5, channels=3, height=8, width=8)
    with seeded(seed, "adapters"):
        return SEED({"queue": queue}, student=STUDENT, teacher=TEACHER, data=data).double()


def shown(method: SEED, images: int, seed: int) -> Tensor:
    """A step, and the directions of the teacher's embeddings in it."""
    teacher = draw(TEACHER, seed, images)
    method(draw(STUDENT, seed + 100, images), teacher)
    return teacher.embedding / teacher.embedding.norm(dim=1, keepdim=True)


def test_the_queue_begins_with_random_directions_that_the_seed_tells() -> None:
    first, again, other = (a_method(2000, 5000, seed).held("queue") for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).all(1).any()
    torch.testing.assert_close(first.norm(dim=1), torch.ones(2000, dtype=torch.float64), rtol=1e-6, atol=0)
    assert first.mean(0).abs().max() < 5 / (2000 * TEACHER.embedding) ** 0.5


@pytest.mark.parametrize(("queue", "images", "rows"), [(20, 50, 20), (65536, 50, 50), (20, 0, 20)])
def test_the_queue_is_no_longer_than_the_training_set_where_that_is_known(queue: int, images: int, rows: int) -> None:
    assert a_method(queue, images).held("queue").shape == (rows, TEACHER.embedding)


def test_each_batch_takes_the_place_of_the_oldest_rows() -> None:
    method = a_method(7)
    start = method.held("queue").clone()
    batches = [shown(method, 3, seed) for seed in (1, 2)]
    torch.testing.assert_close(method.held("queue"), torch.cat([*batches, start[6:]]))
    latest = shown(method, 3, 3)  # of 7 rows one is left, then it goes on from the first
    torch.testing.assert_close(method.held("queue"), torch.cat([latest[1:], batches[0][2:], batches[1], latest[:1]]))
    assert method.held("oldest") == 2


def test_of_a_batch_longer_than_the_queue_its_last_images_stay() -> None:
    method = a_method(4)
    latest = shown(method, 3, 1)
    assert method.held("oldest") == 3
    latest = shown(method, 9, 2)
    torch.testing.assert_close(method.held("queue"), latest[-4:].roll(3, 0))
    assert method.held("oldest") == 3


def test_a_loss_is_of_the_queue_as_it_was_before_its_batch() -> None:
    """The gradient too, though the queue has moved when it is computed: by differences of the loss on the queue as it was."""
    method, given = a_method(5), scene(PAIRS["wide embedding"])
    start = method.held("queue").clone()
    moved = given.student.embedding.clone().requires_grad_()
    method(given.student._replace(embedding=moved), given.teacher)["seed_kd"].backward()
    assert not torch.equal(method.held("queue"), start)

    def loss(step: float) -> float:
        method.held("queue").copy_(start)
        embedding = given.student.embedding.clone()
        embedding[1, 2] += step
        return method(given.student._replace(embedding=embedding), given.teacher)["seed_kd"].item()

    assert moved.grad is not None
    assert moved.grad[1, 2].item() == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-5)


def test_the_queue_holds_no_graph_of_a_teacher_that_gives_one() -> None:
    method, given = a_method(5), scene(PAIRS["wide embedding"])
    teacher = Outputs(given.teacher.logits, given.teacher.embedding.clone().requires_grad_(), {})
    method(given.student, teacher)["seed_kd"].backward()
    assert not method.held("queue").requires_grad
    assert teacher.embedding.grad is None
