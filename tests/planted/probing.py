"""Mistakes with backbones that no label taught, and with what their features are worth."""

from __future__ import annotations

import test_without_labels
import torch

from flowdistill.data.interfaces import EvalSet
from flowdistill.models import base
from flowdistill.training import linear_probe, nearest

from .bug import bug

NEIGHBOURS = test_without_labels.test_neighbours_as_scikit_learn_finds_them
features_of, nearest_classes = linear_probe.features_of, nearest.nearest_classes


@bug(base.ImageFactory, "network", test_without_labels.test_it_leaves_a_backbone_and_no_figure)
def a_classifier_that_nobody_trained(self, data):
    """num_classes=1 where there are none: the file ships random scores beside the features, and looks like a classifier."""
    return self.make(data.channels, data.classes or 1)


@bug(nearest, "nearest_classes", NEIGHBOURS, {"k": 7})
def every_neighbour_has_one_vote(features, train, labels, classes, k=20):
    """The majority among the nearest, as KNeighborsClassifier has by default: other figures than the papers'."""
    train, features = (part / part.norm(dim=1, keepdim=True) for part in (train, features))
    return torch.nn.functional.one_hot(labels[(features @ train.T).topk(k, 1)[1]], classes).sum(1).argmax(1)


@bug(nearest, "nearest_classes", NEIGHBOURS, {"k": 7})
def features_not_of_norm_one(features, train, labels, classes, k=20):
    """Inner products of features as they are: an image with a long feature is everybody's neighbour."""
    similarity, near = (features @ train.T).topk(k, 1)
    votes = torch.zeros(len(features), classes, dtype=similarity.dtype)
    return votes.scatter_add_(1, labels[near], (similarity / 0.07).softmax(1)).argmax(1)


@bug(linear_probe, "features_of", test_without_labels.test_a_probe_of_a_run, {"how": "knn"})
def features_in_train_mode(net, on: EvalSet, device, precision, at_most):
    """No eval(): each batch is normalised by itself, so that an image's feature depends on its neighbours."""
    net.train()
    return features_of(net, on, device, precision, at_most)
