"""A conformance suite for anything that stands between autograd and the tensors it saves: compressors, offloaders.

Subclass it in a test file, say how to open your saver, and let pytest collect it:

    class TestMySaver(SaverConformance):
        gradient_tolerance = 0.02

        def saver(self, model):
            return my_saved_tensor_context(model)

Each test is a way in which a plausible saver gives wrong gradients, or saves no memory, without an error.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its name in every PyTorch program)
from torch import nn
from torch.utils.checkpoint import checkpoint

from holdfast.kernels._torch_private import StorageWatch
from holdfast.kernels.quant import INT8, QuantSpec, dequantize, quantize

Grads = dict[str, torch.Tensor]


class SaverConformance:
    """Override `saver`. `gradient_tolerance` is the relative error allowed where a saver may be lossy; 0 for offloaders."""

    gradient_tolerance = 0.02
    device = "cpu"

    def saver(self, model: nn.Module) -> AbstractContextManager[object]:
        """A context to run forward of `model` in."""
        raise NotImplementedError

    # -- values ----------------------------------------------------------------------------------------------------------

    def test_forward_is_bit_exact_and_gradients_are_close(self) -> None:
        model = self._seeded(lambda: _Attention(64, 4))
        x = self._data(2, 128, 64)
        exact, found = self._both(model, lambda: model(x).square().mean())
        assert torch.equal(exact.pop("loss"), found.pop("loss"))
        assert _error(exact, found) <= self.gradient_tolerance

    def test_gradients_of_inputs_see_exact_weights(self) -> None:
        """A linear layer's input gradient depends on the weight alone, which is saved as a view of the parameter."""
        model = self._seeded(lambda: nn.Linear(128, 96))
        self._input_gradient_is_exact(model)

    def test_autocast_copies_of_weights_stay_exact(self) -> None:
        model = self._seeded(lambda: nn.Linear(128, 96))
        self._input_gradient_is_exact(model, autocast=True)

    def test_autocast_copies_of_frozen_weights_stay_exact(self) -> None:
        """They have no history that would lead back to a parameter."""
        model = self._seeded(lambda: nn.Linear(128, 96))
        model.requires_grad_(False)
        self._input_gradient_is_exact(model, autocast=True)

    def test_loss_inputs_stay_exact(self) -> None:
        logits = self._data(256, 512).requires_grad_()
        target = torch.arange(256, device=self.device)
        exact = torch.autograd.grad(F.cross_entropy(logits, target), logits)[0]
        with self.saver(nn.Identity()):
            loss = F.cross_entropy(logits, target)
        assert torch.equal(torch.autograd.grad(loss, logits)[0], exact)

    def test_logsumexp_of_attention_stays_exact(self) -> None:
        """Flat rows among sharp ones: a logsumexp rounded to a common step scales all probabilities of the flat rows."""
        q, k, v = (self._data(2, 4, 256, 64, seed=i) for i in range(3))
        q = q * torch.tensor([0.01, 100.0], device=self.device).repeat(128)[:, None]
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]

        def grads(out: torch.Tensor) -> list[torch.Tensor]:
            return list(torch.autograd.grad(out[:, :, ::2].square().sum(), leaves))

        q, k, v = (t * 1 for t in leaves)
        exact = grads(F.scaled_dot_product_attention(q, k, v))
        with self.saver(nn.Identity()):
            q, k, v = (t * 1 for t in leaves)
            out = F.scaled_dot_product_attention(q, k, v)
        error = _norm_of([a - b for a, b in zip(exact, grads(out), strict=True)]) / _norm_of(exact)
        assert error <= 3 * self.gradient_tolerance, f"gradient off by {error:.2g}"

    def test_masks_and_indices_stay_exact(self) -> None:
        model = self._seeded(lambda: nn.Embedding(1000, 64))
        index = torch.randint(0, 1000, (64, 64), generator=torch.Generator().manual_seed(4)).to(self.device)

        def loss() -> torch.Tensor:
            x = model(index)
            x = F.dropout(x, 0.3, training=True)
            return x.masked_fill(x > 0.5, 0.0).sum()

        exact, found = self._both(model, loss)
        assert all(torch.equal(exact[name], found[name]) for name in exact)

    # -- geometry --------------------------------------------------------------------------------------------------------

    def test_shapes_and_strides_come_back(self) -> None:
        """Kernels read strides: attention on the CPU is wrong by 200 % if its last stride is not 1 and was in forward."""
        base = self._data(4, 64, 96).requires_grad_()
        views: list[Callable[[torch.Tensor], torch.Tensor]] = [
            lambda t: t,
            lambda t: t.transpose(0, 2),
            lambda t: t[:, :, 32:64],
            lambda t: t.view(4, 64, 3, 32).permute(2, 0, 1, 3)[1],
            lambda t: t[:, :1].expand(4, 64, 96),
            lambda t: t[::2, ::3],
            lambda t: t[0].t(),
        ]
        for view in views:
            with self.saver(nn.Identity()):
                x = view(base * 1)
                y = _Recorder.apply(x)  # type: ignore[no-untyped-call]
            y.sum().backward()
            expected = (tuple(x.shape), x.stride(), x.dtype)
            assert _Recorder.seen == expected, f"saved with {expected}, came back with {_Recorder.seen}"

    def test_slices_of_one_storage_and_their_whole_do_not_mix_up(self) -> None:
        base = self._data(128, 96).requires_grad_()

        def loss() -> torch.Tensor:
            x = base * 1.0
            a, b, c = x.chunk(3, dim=1)
            square = x[:96, :]
            return (a * b * c).sum() + (x * x.sin()).sum() + (square @ square.t()).sum() * 1e-2 + (square * square.t()).sum()

        self._leaf_gradient_is_close(base, loss, nn.Identity())

    def test_a_new_tensor_at_a_freed_address_is_not_taken_for_the_old_one(self) -> None:
        x = self._data(64, 256).requires_grad_()

        def loss() -> torch.Tensor:
            y = x
            for i in range(20):
                y = (y * (0.5 + 0.1 * i)).sin() + x
            return y.sum()

        self._leaf_gradient_is_close(x, loss, nn.Identity(), scale=10)

    # -- promises of autograd -----------------------------------------------------------------------------------------------

    def test_a_weight_changed_before_backward_is_reported(self) -> None:
        model = self._seeded(lambda: nn.Linear(128, 128))
        x = self._data(64, 128).requires_grad_()
        with self.saver(model):
            y = model(x).sum()
        with torch.no_grad():
            model.weight.add_(1.0)  # type: ignore[operator]
        assert _raises(y.backward), "an optimizer step between forward and backward went unnoticed"

    def test_a_tensor_changed_in_place_after_it_was_saved_is_reported_or_was_copied(self) -> None:
        x = self._data(64, 256).requires_grad_()
        with self.saver(nn.Identity()):
            y = x * 1.0
            z = y.sin()
            y.add_(100.0)
        try:
            (gradient,) = torch.autograd.grad(z.sum(), x)
        except RuntimeError:
            return
        cosine = x.detach().cos()
        assert float((gradient - cosine).norm() / cosine.norm()) <= max(self.gradient_tolerance, 1e-6) * 3

    def test_backward_may_run_twice(self) -> None:
        model = self._seeded(lambda: _Attention(64, 4))
        x = self._data(2, 128, 64)
        with self.saver(model):
            loss = model(x).square().mean()
        weights = list(model.parameters())
        first = torch.autograd.grad(loss, weights, retain_graph=True)
        second = torch.autograd.grad(loss, weights)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_a_region_checkpointed_inside_is_still_recomputed(self) -> None:
        calls = []
        inner = self._seeded(lambda: nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128)))

        def region(x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            with self.saver(inner):
                return inner(x)  # type: ignore[no-any-return]

        x = self._data(64, 128).requires_grad_()
        checkpoint(region, x, use_reentrant=False).sum().backward()
        assert len(calls) == 2, "the saver's hooks replaced those of checkpoint, which then saves nothing"

    def test_around_a_checkpoint_gradients_are_close(self) -> None:
        model = self._seeded(lambda: _Attention(64, 4))
        x = self._data(2, 128, 64)
        exact, found = self._both(model, lambda: checkpoint(model, x * 1.0, use_reentrant=False).square().mean())
        assert torch.equal(exact.pop("loss"), found.pop("loss"))
        assert _error(exact, found) <= self.gradient_tolerance

    # -- memory ----------------------------------------------------------------------------------------------------------

    def test_originals_are_let_go(self) -> None:
        """A saver that keeps the original alive, by a cycle or by a cache, saves nothing."""
        x = self._data(256, 256).requires_grad_()
        gc.collect()
        gc.disable()
        try:
            with self.saver(nn.Identity()):
                y = x * 2.0
                watch = StorageWatch(y.untyped_storage())
                z = y.sin()
                w = z.exp()  # saves its own result
                result = StorageWatch(w.untyped_storage())
                total = w.sum()
                del y, z, w
            assert watch.get() is None, "an input saved for backward is still alive"
            assert result.get() is None, "a result saved for backward is still alive"
            total.backward()  # type: ignore[no-untyped-call]
        finally:
            gc.enable()

    def test_a_graph_that_is_dropped_without_backward_leaves_nothing_behind(self) -> None:
        model = self._seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)))
        context = self.saver(model)
        gc.collect()
        gc.disable()
        try:
            with context:
                y = model(self._data(4, 8))  # small: most savers keep these as they are
                watch = StorageWatch(y.untyped_storage())
            del y
            assert watch.get() is None, "what was kept exact holds its own graph alive"
        finally:
            gc.enable()

    # -- helpers ---------------------------------------------------------------------------------------------------------

    def _seeded(self, build: Callable[[], nn.Module]) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build().to(self.device)

    def _data(self, *shape: int, seed: int = 1) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def _both(self, model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> tuple[Grads, Grads]:
        """Gradients and loss without and with the saver, from equal random numbers."""
        results = []
        for context in (None, self.saver(model)):
            model.zero_grad(set_to_none=True)
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(5)
                if context is None:
                    loss = loss_of()
                else:
                    with context:
                        loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            results.append({"loss": loss.detach(), **grads})
        return results[0], results[1]

    def _input_gradient_is_exact(self, model: nn.Module, *, autocast: bool = False) -> None:
        x = self._data(64, 128).requires_grad_()
        grads = []
        for context in (None, self.saver(model)):
            with torch.autocast(self.device, torch.bfloat16, enabled=autocast):
                if context is None:
                    y = model(x)
                else:
                    with context:
                        y = model(x)
            grads.append(torch.autograd.grad(y.float().sum(), x)[0])
        assert torch.equal(grads[0], grads[1]), "the weight was not exact in backward"

    def _leaf_gradient_is_close(
        self, leaf: torch.Tensor, loss_of: Callable[[], torch.Tensor], model: nn.Module, scale: float = 1
    ) -> None:
        (exact,) = torch.autograd.grad(loss_of(), leaf)
        with self.saver(model):
            loss = loss_of()
        (found,) = torch.autograd.grad(loss, leaf)
        error = float((exact - found).norm() / exact.norm())
        assert error <= self.gradient_tolerance * scale, f"gradient off by {error:.2g}"


class _Attention(nn.Module):
    """A pre-norm transformer block whose q, k, v are slices of one tensor."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class _Recorder(torch.autograd.Function):
    """Notes the geometry of what backward gets to see."""

    seen: Any = None

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        _Recorder.seen = (tuple(x.shape), x.stride(), x.dtype)
        return grads[0] * 2


def naive_saver(spec: QuantSpec = INT8, min_bytes: int = 1 << 14) -> AbstractContextManager[None]:
    """The hook everyone writes first: pack every float tensor above a size. It fails most of this suite, which is its use."""

    def pack(t: torch.Tensor) -> Any:
        return quantize(t, spec) if t.is_floating_point() and t.nbytes >= min_bytes else t

    def unpack(saved: Any) -> torch.Tensor:
        return saved if isinstance(saved, torch.Tensor) else dequantize(saved)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _error(exact: Grads, found: Grads) -> float:
    return _norm_of([exact[n] - found[n] for n in exact]) / _norm_of(list(exact.values()))


def _norm_of(tensors: list[torch.Tensor]) -> float:
    return float(torch.stack([t.float().norm() for t in tensors]).norm())


def _raises(action: Callable[[], Any]) -> bool:
    try:
        action()
    except RuntimeError:
        return True
    return False
