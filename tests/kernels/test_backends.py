"""Inductor and Triton return the reference's bytes. Triton runs in its interpreter here: few programs, each a large one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import holdfast
from holdfast.kernels.quant import (
    INT2,
    INT4,
    INT8,
    KIVI_KEY4,
    KIVI_VALUE4,
    MASK1,
    MXFP8,
    MXINT8,
    QuantSpec,
    dequantize,
    quantize,
    triton_is_installed,
)

BLOCK_SPECS = [
    INT8,
    INT4,
    INT2,
    MXINT8,
    MXFP8,
    KIVI_KEY4,
    KIVI_VALUE4,
    QuantSpec(scale="fp32", block=128),
    QuantSpec(kind="int4", block=32),
    QuantSpec(kind="int2", block=256),
    QuantSpec(kind="int8", symmetric=False, scale="fp32"),
    QuantSpec(kind="int4", symmetric=False, scale="fp32", axis=(1, 3)),
    QuantSpec(rounding="stochastic"),
    QuantSpec(kind="int4", symmetric=False, rounding="stochastic"),
    QuantSpec(kind="mxint8", block=32, scale="e8m0", rounding="stochastic"),
]


def hostile_values(dtype: torch.dtype) -> torch.Tensor:
    """(2, 3, 70, 48): wide ranges, ties, zeros of both signs, subnormals, NaN, infinities and the ends of float32."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(2, 3, 70, 48, generator=generator) * torch.exp2(torch.randn(2, 3, 70, 48, generator=generator) * 8)
    flat = x.view(-1)
    flat[0:256] = 0.0
    flat[256:320] = -0.0
    flat[320:384] = torch.arange(64) * 0.5
    flat[384:448] = 1e-40
    flat[1000], flat[2000], flat[3000] = float("nan"), float("inf"), -float("inf")
    flat[4000], flat[4001] = 3.4e38, -3.4e38
    flat[5000:5064] = 17.0
    flat[6000:6064] = -torch.rand(64, generator=generator) - 100
    return x.to(dtype)


def assert_same_bytes(x: torch.Tensor, spec: QuantSpec, backend: str) -> None:
    expected = quantize(x, spec, seed=5, stream=2, backend="reference")
    found = quantize(x, spec, seed=5, stream=2, backend=backend)
    for part, reference in zip(found.parts, expected.parts, strict=True):
        same = part.view(torch.uint8).cpu() == reference.view(torch.uint8).cpu()
        assert bool(same.all()), f"{spec} {x.dtype}: {int((~same).sum())} of {same.numel()} bytes differ"
    back, oracle = dequantize(expected, backend=backend), dequantize(expected, backend="reference")
    assert back.shape == oracle.shape
    assert torch.equal(back.isnan(), oracle.isnan())
    assert torch.equal(back.nan_to_num(0), oracle.nan_to_num(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch while it compiles
@pytest.mark.parametrize("spec", [INT8, QuantSpec(kind="int4", symmetric=False, scale="fp32")], ids=str)
def test_inductor_returns_the_bytes_of_the_reference(spec: QuantSpec) -> None:
    pytest.importorskip("torch._inductor")
    assert_same_bytes(hostile_values(torch.float32 if spec is INT8 else torch.bfloat16), spec, "inductor")


ROW_SPECS = [
    MASK1,
    QuantSpec(kind="mask1", scale="fp32", block=32, axis=(-2,)),
    QuantSpec(axis=(-1,), block=None, rounding="stochastic"),
    QuantSpec(axis=(-1,), block=None),
    QuantSpec(kind="int4", symmetric=False, axis=(-2, -1), block=None, scale="fp32"),
    QuantSpec(kind="int2", symmetric=False, axis=(-1,), block=None),
]


@pytest.mark.campaign
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch while it compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", [*BLOCK_SPECS, *ROW_SPECS], ids=str)
def test_inductor_returns_the_bytes_of_the_reference_for_every_format(spec: QuantSpec, dtype: torch.dtype) -> None:
    assert_same_bytes(hostile_values(dtype), spec, "inductor")


@pytest.mark.skipif(not triton_is_installed(), reason="triton is not installed")
def test_interpreted_triton_returns_the_bytes_of_the_reference() -> None:
    """In a process of its own: Triton decides between compiling and interpreting when it is first imported."""
    root = str(Path(holdfast.__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "TRITON_INTERPRET": "1",
        "PYTHONWARNINGS": "ignore",
        "HOLDFAST_TRITON_CASES": "1",
    }
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len([*BLOCK_SPECS, *ROW_SPECS]) * 3 + 1} cases" in result.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*BLOCK_SPECS, *ROW_SPECS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_returns_the_bytes_of_the_reference(spec: QuantSpec, dtype: torch.dtype) -> None:
    assert_same_bytes_across_devices(hostile_values(dtype), spec)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [INT8, INT4, INT2, MXINT8, MXFP8], ids=str)
def test_gpu_returns_the_bytes_of_the_reference_on_many_random_values(spec: QuantSpec) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 22,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    assert_same_bytes_across_devices(bits.view(torch.float32), spec)  # every kind of float32 there is
    assert_same_bytes_across_devices(torch.randn(3, 1001, 333, generator=torch.Generator().manual_seed(2)), spec)


def assert_same_bytes_across_devices(x: torch.Tensor, spec: QuantSpec) -> None:
    expected = quantize(x, spec, seed=5, stream=2, backend="reference")
    for backend in ("triton", "reference"):
        found = quantize(x.cuda(), spec, seed=5, stream=2, backend=backend)
        for part, reference in zip(found.parts, expected.parts, strict=True):
            differing = int((part.view(torch.uint8).cpu() != reference.view(torch.uint8)).sum())
            assert differing == 0, f"{backend} {spec} {x.dtype}: {differing} of {reference.nbytes} bytes differ"
    oracle, back = dequantize(expected), dequantize(expected.to("cuda"), backend="triton").cpu()
    assert torch.equal(back.isnan(), oracle.isnan())
    assert torch.equal(back.nan_to_num(0), oracle.nan_to_num(0))


if __name__ == "__main__" and os.environ.get("HOLDFAST_TRITON_CASES"):
    from holdfast.kernels.quant import triton_kernels, triton_rows

    triton_kernels.ELEMENTS_PER_PROGRAM = 1 << 14
    triton_rows.ELEMENTS_PER_STEP = 128  # a head then takes several steps
    few = [0, 5, 6, 7, 8, 9, 13, 20, 34, 41, 62]  # tokens that hold every hostile value: a row is a program
    cases = [(spec, dtype) for spec in [*BLOCK_SPECS, *ROW_SPECS] for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    for spec, dtype in cases:
        x = hostile_values(dtype)
        x = x[:, :, few] if spec in ROW_SPECS else x
        assert_same_bytes(x, spec, "triton")
    assert_same_bytes(hostile_values(torch.float32)[:, :, few] > 0, MASK1, "triton")
    for spec in ROW_SPECS:
        assert_same_bytes(
            hostile_values(torch.float32)[:, :1, :5, :47], spec, "triton"
        )  # rows that do not fill their last byte
    print(len(cases) + 1, "cases")
