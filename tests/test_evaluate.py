"""Accuracy counts every image once, in eval mode, and leaves the network as it was."""

import pytest
import torch
from torch import Tensor, nn

from flowdistill import models
from flowdistill.data.batches import Normalisation, ResidentSet
from flowdistill.data.interfaces import BATCH
from flowdistill.models import Network
from flowdistill.training.evaluate import evaluate
from flowdistill.types import DataSpec, NetSpec, Outputs

CLASSES = 10
NORMALISE = Normalisation((0.5,), (0.25,)).on(torch.device("cpu"))


def resident(images: Tensor, labels: Tensor) -> ResidentSet:
    return ResidentSet(images, labels, NORMALISE)


def some(n: int) -> ResidentSet:
    chance = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 8, 8, 1), dtype=torch.uint8, generator=chance)
    return resident(images, torch.randint(0, CLASSES, (n,), generator=chance))


def a_net() -> Network:
    """A small ResNet whose batch statistics are those of a few batches, its answers spread over the classes."""
    net = models.build("resnet8", DataSpec("some", 1, CLASSES, 1, 8, 8))
    with torch.no_grad():
        net.fc.weight *= 5
        for _ in range(3):
            net(NORMALISE(some(200).images))
    return net


class Told(Network):
    """A network that reads its logits off the image: pixel (0, k) is logit k after normalisation."""

    def __init__(self, lost: int = 0) -> None:
        super().__init__()
        self.spec, self.taps, self.lost, self.sizes = NetSpec("told", (), 1, 4), (), lost, []
        self.inner = nn.BatchNorm2d(1)

    def forward(self, images: Tensor) -> Outputs:
        self.sizes.append(len(images))
        logits = images[: len(images) - self.lost, 0, 0, :4]
        return Outputs(logits, logits[:, :1])


def told(*rows: list[int]) -> Tensor:
    """Images whose first row of pixels is given."""
    images = torch.zeros(len(rows), 4, 4, 1, dtype=torch.uint8)
    images[:, 0, :, 0] = torch.tensor(rows, dtype=torch.uint8)
    return images


@pytest.mark.parametrize("n", [1, BATCH - 1, BATCH, BATCH + 1, 1203])
def test_every_image_is_counted_and_correct_equals_a_naive_loop(n):
    net, on = a_net(), some(n)
    found = evaluate(net, on, "fp32")
    net.eval()
    correct, classes, probabilities = 0, [], []
    with torch.no_grad():
        for image, label in zip(on.images, on.labels, strict=True):
            pixels = ((image.float() / 255 - 0.5) / 0.25).permute(2, 0, 1)
            logits = net(pixels[None]).logits[0].double()
            classes.append(int(logits.argmax()))
            probabilities.append(float(logits.exp()[classes[-1]] / logits.exp().sum()))
            correct += classes[-1] == int(label)
    assert found.classes.tolist() == classes
    assert found.probabilities.tolist() == pytest.approx(probabilities, rel=1e-4)
    assert (int(found.correct), found.correct.shape) == (correct, ())
    assert len(found.classes) == len(found.probabilities) == n


def test_the_answers_of_the_naive_loop_are_of_many_classes():
    """Else the test above could not fail."""
    assert len(set(evaluate(a_net(), some(1203), "fp32").classes.tolist())) >= 5


def test_all_right_is_1203_and_all_wrong_is_none():
    net, on = a_net(), some(1203)
    answers = evaluate(net, on, "fp32").classes
    assert int(evaluate(net, resident(on.images, answers), "fp32").correct) == 1203
    assert int(evaluate(net, resident(on.images, (answers + 1) % CLASSES), "fp32").correct) == 0
    last_only = torch.cat([(answers[:-1] + 1) % CLASSES, answers[-1:]])
    assert int(evaluate(net, resident(on.images, last_only), "fp32").correct) == 1


def test_the_last_batch_is_the_partial_one():
    net = Told()
    evaluate(net, resident(told(*[[9, 0, 0, 0]] * 1203), torch.zeros(1203, dtype=torch.long)), "fp32")
    assert net.sizes == [BATCH, BATCH, 1203 - 2 * BATCH]


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_put_back(training):
    net = a_net().train(training)
    seen = []
    net.fc.register_forward_pre_hook(lambda module, _: seen.append((net.training, net.bn1.training)))
    evaluate(net, some(20), "fp32")
    assert seen == [(False, False)]
    assert {module.training for module in net.modules()} == {training}


def test_weights_statistics_and_gradients_are_left_alone():
    net = a_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = evaluate(net, some(600), "fp32")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not found.probabilities.requires_grad
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.is_grad_enabled()


def test_images_are_left_alone():
    on = some(30)
    images, labels = on.images.clone(), on.labels.clone()
    evaluate(a_net(), on, "fp32")
    assert torch.equal(on.images, images)
    assert torch.equal(on.labels, labels)


def test_order_of_the_images_changes_no_answer():
    net, on = a_net(), some(700)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    plain, shuffled = (evaluate(net, there, "fp32") for there in (on, resident(on.images[order], on.labels[order])))
    assert torch.equal(shuffled.classes, plain.classes[order])
    assert int(shuffled.correct) == int(plain.correct)


@pytest.mark.parametrize(
    ("row", "best", "among"),
    [([7, 7, 7, 7], 0, 4), ([0, 9, 9, 0], 1, 2), ([0, 0, 0, 200], 3, 1), ([3, 255, 0, 255], 1, 2)],
)
def test_a_tie_is_the_first_class_and_shares_its_probability(row, best, among):
    """Equal logits: the lowest class, so that a network that says nothing scores the share of class 0, no more."""
    found = evaluate(Told(), resident(told(row, row), torch.tensor([best, (best + 1) % 4])), "fp32")
    assert found.classes.tolist() == [best, best]
    assert int(found.correct) == 1
    logits = torch.tensor(row, dtype=torch.float64) / 255 / 0.25
    assert found.probabilities.tolist() == pytest.approx([float(logits.softmax(0)[best])] * 2, rel=1e-5)
    assert int((logits == logits.max()).sum()) == among


def test_equal_logits_have_probability_one_over_classes():
    found = evaluate(Told(), resident(told([5, 5, 5, 5]), torch.tensor([0])), "fp32")
    assert found.probabilities.tolist() == [0.25]


@pytest.mark.parametrize("n", [1, 20, BATCH + 1])
def test_too_few_answers_are_refused(n):
    with pytest.raises(RuntimeError, match=f"answers for a batch of {min(n, BATCH)} images"):
        evaluate(Told(lost=1), resident(told(*[[1, 2, 3, 4]] * n), torch.zeros(n, dtype=torch.long)), "fp32")


def test_more_images_than_labels_are_refused():
    with pytest.raises(RuntimeError, match="20 answers for a batch of 19 images"):
        evaluate(a_net(), resident(some(20).images, some(20).labels[:-1]), "fp32")


def test_bf16_runs_the_network_in_bf16_and_the_softmax_in_float32():
    net, on, seen = a_net(), some(600), []
    net.fc.register_forward_hook(lambda module, _, out: seen.append(out.dtype))
    half = evaluate(net, on, "bf16")
    whole = evaluate(net, on, "fp32")
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert half.probabilities.dtype == torch.float32
    assert (half.probabilities - whole.probabilities).abs().max() < 0.1
    assert (half.classes == whole.classes).float().mean() > 0.95


def test_an_answer_that_is_no_number_is_never_right():
    """Softmax and argmax of NaN give class 0, which may be the label."""
    net, on = a_net(), resident(some(6).images, torch.zeros(6, dtype=torch.long))
    hit = torch.tensor([1, 0, 1, 0, 0, 0], dtype=torch.bool)[:, None]
    for value, unanswered in ((torch.nan, 2), (torch.inf, 2)):
        hook = net.fc.register_forward_hook(lambda _, __, out, value=value: out.masked_fill(hit, value))
        found = evaluate(net, on, "fp32")
        hook.remove()
        assert int(found.unanswered) == unanswered
        assert not found.probabilities.isfinite()[[0, 2]].any()
        assert not found.in_top5[[0, 2]].any()
        assert int(found.correct) == int((evaluate(net, on, "fp32").classes[~hit[:, 0]] == 0).sum())
    hook = net.fc.register_forward_hook(lambda _, __, out: torch.cat([out[:, :1], torch.full_like(out[:, 1:], -torch.inf)], 1))
    assert int(evaluate(net, on, "fp32").unanswered) == 0, "a class may be ruled out"
    hook.remove()
