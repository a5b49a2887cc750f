"""Snapshots in few bits: the bound holds for every value, and Adam's second moment survives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import ConfigError, HoldfastError, MissingData
from holdfast.kernels.lossy import (
    LossySpec,
    decode_lossy,
    encode_lossy,
    lossy_from_bytes,
    lossy_to_bytes,
    spec_for_state,
)
from holdfast.kernels.quant.wire import frame, unframe


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(0, 400),
    spread=st.sampled_from([0.0, 1.0, 20.0]),
    bound=st.sampled_from([0.001, 0.003, 0.005, 0.1]),
    sqrt=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_no_value_misses_the_bound(n: int, spread: float, bound: float, sqrt: bool, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * torch.exp2(torch.randn(n, generator=generator) * spread).clamp(1e-15, 1e15)
    x = (x.square() if sqrt else x).to(dtype)
    lossy = encode_lossy(x, LossySpec(bound=bound, sqrt=sqrt))
    back = decode_lossy(lossy)
    assert back.shape == x.shape
    assert back.dtype == dtype
    for start in range(0, n, 64):
        a, b = x[start : start + 64].float(), back[start : start + 64].float()
        if sqrt:
            a, b = a.sqrt(), b.sqrt()
        assert float((a - b).abs().max()) <= bound * float(a.abs().max()) * (1 + 1e-6)


def test_blocks_that_miss_the_bound_are_stored_as_they_are() -> None:
    x = torch.randn(640, generator=torch.Generator().manual_seed(0))
    x[200] = float("inf")
    loose, tight = (encode_lossy(x, LossySpec(bound=b)) for b in (0.01, 1e-5))
    assert loose.raw_blocks.tolist() == [3]
    assert decode_lossy(loose)[200] == float("inf")
    assert tight.raw_blocks.numel() == 10
    assert torch.equal(decode_lossy(tight), x)
    assert loose.nbytes < 0.4 * x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_replica_comes_back_from_its_bytes_and_every_flipped_byte_is_refused(dtype: torch.dtype) -> None:
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(0)).square().to(dtype)
    x[1, 2] = float("nan")
    lossy = encode_lossy(x, LossySpec(sqrt=True))
    data = lossy_to_bytes(lossy)
    back = lossy_from_bytes(data)
    assert lossy.raw_blocks.tolist() == back.raw_blocks.tolist() == [1]
    assert back.spec == lossy.spec
    assert torch.equal(decode_lossy(back).nan_to_num(7), decode_lossy(lossy).nan_to_num(7))
    assert lossy_to_bytes(back) == data
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(HoldfastError):
            lossy_from_bytes(bytes(damaged))
        with pytest.raises(MissingData):
            lossy_from_bytes(data[:place])


def test_a_tensor_without_elements_or_raw_blocks_comes_back_from_its_bytes() -> None:
    for x in (torch.empty(0, 4), torch.ones(64)):
        assert torch.equal(decode_lossy(lossy_from_bytes(lossy_to_bytes(encode_lossy(x, LossySpec())))), x)


@pytest.mark.parametrize("parts", [[0, 0, 0], [1, 2], "x", [10**9, 0, 0]])
def test_a_description_that_contradicts_its_payload_is_refused(parts: object) -> None:
    description, payload = unframe(b"HFLT", lossy_to_bytes(encode_lossy(torch.ones(64), LossySpec())), "lossy tensor")
    with pytest.raises(HoldfastError):
        lossy_from_bytes(frame(b"HFLT", {**description, "parts": parts}, bytes(payload)))


def resumed_loss(transform) -> float:  # type: ignore[no-untyped-def]
    """Largest change of the loss in 20 steps after Adam's moments went through `transform`, against an exact resume."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(64, 32, generator=generator)
    target = (data @ torch.randn(32, 32, generator=generator)).tanh()
    scales = torch.exp2(torch.linspace(-12, 4, 32))  # features of very different size: second moments to match

    def run(lossy: bool) -> list[float]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for step in range(60):
            if step == 40 and lossy:
                for state in optimizer.state.values():
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name].copy_(transform(name, state[name]))
            loss = (model(data * scales) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[40:]

    return max(abs(a - b) for a, b in zip(run(True), run(False), strict=True))


def test_the_second_moment_survives_as_a_square_root_and_not_linearly() -> None:
    def ours(name: str, t: torch.Tensor) -> torch.Tensor:
        return decode_lossy(encode_lossy(t, spec_for_state(f"optim/w/{name}")))

    def linear(name: str, t: torch.Tensor) -> torch.Tensor:
        return decode_lossy(encode_lossy(t, LossySpec()))

    assert resumed_loss(ours) * 10 < resumed_loss(linear)
    assert resumed_loss(ours) < 0.01


def test_state_that_must_be_exact_is_refused() -> None:
    assert spec_for_state("optim/layers.0.w/exp_avg_sq").sqrt
    assert not spec_for_state("optim/layers.0.w/exp_avg").sqrt
    for name in ("rng", "optim/layers.0.w/step", "data_cursor", "grad_scaler"):
        with pytest.raises(ConfigError, match="must be stored exactly"):
            spec_for_state(name)
    with pytest.raises(ConfigError, match="never negative"):
        encode_lossy(torch.tensor([-1.0]), LossySpec(sqrt=True))
    with pytest.raises(ConfigError, match=r"in \(0, 1\)"):
        LossySpec(bound=0.0)
