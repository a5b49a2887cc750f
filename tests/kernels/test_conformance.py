"""Our saver passes the suite, and the naive hook fails it where we say it fails."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from holdfast.kernels import INT4, OFFLOAD, ActPolicy, compress_activations
from holdfast.kernels.testing import SaverConformance, naive_saver


class TestCompressor(SaverConformance):
    def saver(self, model: nn.Module) -> AbstractContextManager[object]:
        return compress_activations(model, ActPolicy(min_bytes=4096))


class TestCompressorBesideExactLogsumexp(SaverConformance):
    def saver(self, model: nn.Module) -> AbstractContextManager[object]:
        return compress_activations(model, ActPolicy(min_bytes=4096, attention=None))


class TestOffloadedCompressor(SaverConformance):
    def saver(self, model: nn.Module) -> AbstractContextManager[object]:
        return compress_activations(model, ActPolicy(min_bytes=4096), offload="cpu")


class TestInt4Compressor(SaverConformance):
    """int4 with attention rebuilt from what was stored."""

    gradient_tolerance = 0.15

    def saver(self, model: nn.Module) -> AbstractContextManager[object]:
        return compress_activations(model, ActPolicy(min_bytes=4096, default=INT4, attention=INT4))


@pytest.mark.gpu
class TestCompressorOnGPU(SaverConformance):
    device = "cuda"

    def saver(self, model: nn.Module) -> AbstractContextManager[object]:
        return compress_activations(model, ActPolicy(min_bytes=4096))


@pytest.mark.gpu
class TestOffloadedCompressorOnGPU(SaverConformance):
    device = "cuda"

    def saver(self, model: nn.Module) -> AbstractContextManager[object]:
        return compress_activations(model, ActPolicy(min_bytes=4096), offload="cpu")


@pytest.mark.gpu
class TestExactOffloadOnGPU(SaverConformance):
    device = "cuda"
    gradient_tolerance = 1e-5

    def saver(self, model: nn.Module) -> AbstractContextManager[object]:
        return compress_activations(model, ActPolicy(min_bytes=4096, default=OFFLOAD, attention=None))


class Naive(SaverConformance):
    def saver(self, model: nn.Module) -> AbstractContextManager[object]:
        return naive_saver(min_bytes=4096)


NAIVE_FAILURES = {
    "test_gradients_of_inputs_see_exact_weights",
    "test_autocast_copies_of_weights_stay_exact",
    "test_autocast_copies_of_frozen_weights_stay_exact",
    "test_loss_inputs_stay_exact",
    "test_logsumexp_of_attention_stays_exact",
    "test_masks_and_indices_stay_exact",
    "test_shapes_and_strides_come_back",
    "test_a_weight_changed_before_backward_is_reported",
    "test_a_region_checkpointed_inside_is_still_recomputed",
    "test_a_graph_that_is_dropped_without_backward_leaves_nothing_behind",
}
ALL = {name for name in dir(SaverConformance) if name.startswith("test_")}


@pytest.mark.parametrize("name", sorted(NAIVE_FAILURES))
def test_the_naive_hook_fails(name: str) -> None:
    with pytest.raises(AssertionError):
        getattr(Naive(), name)()


@pytest.mark.parametrize("name", sorted(ALL - NAIVE_FAILURES))
def test_the_naive_hook_passes(name: str) -> None:
    getattr(Naive(), name)()


def test_without_any_saver_the_suite_passes_where_nothing_must_shrink() -> None:
    """The suite asks for nothing that plain autograd does not give, except letting originals go."""

    class Plain(SaverConformance):
        gradient_tolerance = 1e-6

        def saver(self, model: nn.Module) -> AbstractContextManager[object]:
            return copy.copy(torch.enable_grad())

    for name in sorted(ALL - {"test_originals_are_let_go"}):
        getattr(Plain(), name)()
    with pytest.raises(AssertionError, match="still alive"):
        Plain().test_originals_are_let_go()
