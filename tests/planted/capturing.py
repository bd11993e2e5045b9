"""Mistakes in how a process computes on a GPU and in what a CUDA graph holds. Signatures are those of what they replace."""

from __future__ import annotations

import contextlib

import test_at_once
import test_cuda_path
import test_device
import test_graph
import torch

from flowdistill import device
from flowdistill.data import interfaces
from flowdistill.training import at_once, graph

from .bug import bug

cast_at_once = at_once.cast_at_once


@bug(graph, "capturing", test_cuda_path.test_on_the_second_gpu_all_streams_are_its_own)
@contextlib.contextmanager
def the_stream_of_a_capture_left_to_torch(held, on, pool=None):
    """torch.cuda.graph(graph) alone: its stream is made once, on the GPU that is current then, and the step trains on one batch."""
    with torch.cuda.graph(held):
        yield


@bug(graph, "_waiting_refused", test_cuda_path.test_the_others_of_its_cohort_are_captured)
@contextlib.contextmanager
def waiting_found_by_the_capture_itself():
    """No trial before: one method that waits for the GPU takes its whole cohort to the plain engine."""
    yield


@bug(graph.GraphEngine, "of", test_graph.test_what_waits_is_trained_beside_the_graph_and_named)
def recorded_as_captured(self, student):
    """The cohort's engine on every record, also of a student that was trained beside the graph."""
    return self.name


@bug(at_once, "counted_at_once", test_at_once.test_training_is_the_same_bit_for_bit, {"precision": "fp32"})
@contextlib.contextmanager
def batches_counted_twice(nets):
    """Counted by the layers, and once more for all of them."""
    yield
    for module in (one for net in nets if net.each_once for one in net.modules() if isinstance(one, torch.nn.BatchNorm2d)):
        module.num_batches_tracked.add_(1)


@bug(at_once, "cast_at_once", test_at_once.test_training_is_the_same_bit_for_bit, {"precision": "bf16"})
@contextlib.contextmanager
def gradients_of_the_weights_that_nobody_used(nets, precision):
    """The cast weights are used and the others are asked for their gradients: they have none, and nothing learns."""
    with cast_at_once(nets, precision):
        yield {}


@bug(device, "_float32", test_device.test_inside_the_gpu_that_is_named_is_current_and_float32_is_float32)
@contextlib.contextmanager
def float32_as_torch_has_it():
    """Convolutions in TF32, ten bits for 23, under the name fp32."""
    yield


@bug(
    interfaces,
    "at_once",
    test_device.test_images_that_are_measured_at_once_go_by_their_pixels,
    {"size": 224, "device": "cuda", "images": 81},
)
def so_many_whatever_their_size(height, width, device):
    """500 images at once: 300 MB of images of 224x224, and many times that of their maps."""
    return 500
