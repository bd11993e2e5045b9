"""Fit a linear probe of a frozen network: multinomial logistic regression on its embedding of the training images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import UserError
from ..data.interfaces import EvalSet, Supply
from ..device import Precision
from ..models import Network
from ..models.joined import Joined
from ..models.probed import Probed
from .evaluate import answering
from .teacher import teach

VERSION = 1  # raised when it gives other numbers; part of a run's fingerprint
IMAGES = 50_000  # of larger data every second, third, ... image is taken
DECAY = 1e-3  # of the weights on features of standard deviation 1; the loss is a mean over images
STEPS = 200


def fit_all(net: Network, data: Supply, precision: Precision) -> dict[str, Tensor]:
    """Fit the probe of a network, or those of several; nothing where there is none. Waits for the device.

    Returns:
        Copies of each one's weight [K, D] and bias [K], with the number of its network before the names if there are several.

    Raises:
        UserError: a feature of these images is not finite.
    """
    if isinstance(net, Joined):
        of_each = {number: fit_all(one, data, precision) for number, one in enumerate(net.parts, 1)}
        return {f"{number}.{name}": value for number, fitted in of_each.items() for name, value in fitted.items()}
    return fit(net, data, precision) if isinstance(net, Probed) else {}


def put_back(net: Network, fitted: Mapping[str, Tensor]) -> None:
    """Give a network, or several, the probes that ``fit_all`` fitted."""
    if isinstance(net, Joined):
        for number, one in enumerate(net.parts, 1):
            own = f"{number}."
            put_back(one, {name.removeprefix(own): value for name, value in fitted.items() if name.startswith(own)})
    elif isinstance(net, Probed):
        net.probe.load_state_dict(fitted)


def fit(net: Probed, data: Supply, precision: Precision) -> dict[str, Tensor]:
    """Fit a network's probe to the labels of the training images, which are neither cropped nor mirrored. Waits for the device.

    Returns:
        A copy of its weight [K, D] and its bias [K].

    Raises:
        UserError: a feature of these images is not finite.
    """
    features, labels = features_of(net.backbone, data.train_eval, data.device, precision, at_most=IMAGES)
    if not features.isfinite().all():
        raise UserError(f"teacher {net.spec.name}: its features of the training images are not finite; mend it, or choose another")
    weight, bias = logistic_regression(features, labels, net.spec.classes)
    with torch.no_grad():
        net.probe.weight.copy_(weight)
        net.probe.bias.copy_(bias)
    return {name: value.detach().clone() for name, value in net.probe.state_dict().items()}


@torch.no_grad()
def features_of(net: Network, on: EvalSet, device: torch.device, precision: Precision, at_most: int) -> tuple[Tensor, Tensor]:
    """Embeddings [n, D] in eval mode, float64 on the CPU, and labels [n] of at most so many images."""
    every, seen = -(-len(on) // at_most), 0
    features, labels = [], []
    for step, (images, of_batch) in enumerate(on.batches()):
        chosen = torch.arange(-seen % every, len(of_batch), every, device=of_batch.device)
        seen += len(of_batch)
        with answering(net, "probe", step, device):
            features.append(teach(net, images[chosen], precision).embedding.double().cpu())
        labels.append(of_batch[chosen].cpu())
    return torch.cat(features), torch.cat(labels)


def logistic_regression(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The weight [K, D] and the bias [K] that minimise the mean cross-entropy plus ``DECAY`` / 2 times the squared weights.

    The features are standardised for that, so that the penalty does not depend on their scale; weight and bias are for the features as they
    are. The minimum is unique; L-BFGS from 0 finds the same for the same features.

    Args:
        features: [n, D] float64.
        labels: [n] class numbers below ``classes``.
        classes: K.
    """
    mean, std = features.mean(0), features.std(0, unbiased=False).clamp(min=1e-8)
    scaled = (features - mean) / std
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=STEPS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(scaled @ weight.T + bias, labels) + DECAY / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    scaled_weight = weight.detach() / std
    return scaled_weight, bias.detach() - scaled_weight @ mean
