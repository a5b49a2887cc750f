"""Quantizers: error bounds, exact encodings, odd shapes, bad input, and the same bytes for the same values."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import ConfigError
from holdfast.kernels.quant import (
    INT2,
    INT4,
    INT8,
    KIVI_KEY4,
    KIVI_VALUE4,
    MASK1,
    MXFP8,
    MXINT8,
    Packed,
    QuantSpec,
    RunningRange,
    RunningSpec,
    dequantize,
    dequantize_running,
    quantize,
)
from holdfast.kernels.quant.bits import (
    bits_float,
    ceil_to_bf16,
    float_bits,
    floor_to_bf16,
    fp8_e4m3_decode,
    fp8_e4m3_encode,
)
from holdfast.kernels.quant.packed import blocking, cut
from holdfast.kernels.quant.philox import philox_4x32, uniform

INTEGER_SPECS = [
    INT8,
    INT4,
    INT2,
    QuantSpec(kind="int8", symmetric=False, scale="fp32"),
    QuantSpec(kind="int4", block=128),
    QuantSpec(kind="int8", block=256, scale="fp32"),
    KIVI_KEY4,
    KIVI_VALUE4,
    QuantSpec(kind="int8", axis=(-2, -1), block=None),
    QuantSpec(kind="int4", symmetric=False, axis=(0, 2), block=32),
    MXINT8,
]


def data(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randn(shape, generator=generator) * 3)
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def step_of_each_element(packed: Packed) -> torch.Tensor:
    """The scale that each element was packed with, in the shape of the tensor."""
    scales = packed.scales
    assert scales is not None
    if packed.spec.scale == "e8m0":
        scales = bits_float(scales.to(torch.int32) << 23) * 2.0**-6
    ones = dataclasses.replace(
        packed,
        spec=QuantSpec(kind="int8", block=packed.spec.block, axis=packed.spec.axis, scale="fp32"),
        codes=torch.ones(scales.numel() * blocking(packed.shape, packed.spec).block, dtype=torch.uint8),
        scales=scales.float(),
        minima=None,
        dtype=torch.float32,
    )
    return dequantize(ones)


@pytest.mark.parametrize("spec", INTEGER_SPECS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 70, 48), (1, 1, 1, 32), (3, 2, 64, 64)])
def test_no_element_is_off_by_more_than_half_a_step(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    x = data(*shape)
    packed = quantize(x, spec)
    step = step_of_each_element(packed)
    # MXINT8's shared exponent leaves values above 127/64 of it clipped by up to one step (OCP Microscaling 1.0, 6.3).
    allowed = 1.0 if spec.kind == "mxint8" else 0.5
    error = (dequantize(packed) - x).abs()
    assert bool((error <= step * allowed * 1.0001 + x.abs() * 2.0**-22).all())
    assert error.max() > 0  # it did quantize


@pytest.mark.parametrize("spec", [*INTEGER_SPECS, MXFP8], ids=str)
def test_stochastic_rounding_is_unbiased_and_within_one_step(spec: QuantSpec) -> None:
    if spec.kind == "mxfp8":
        with pytest.raises(ConfigError, match="nearest only"):
            dataclasses.replace(spec, rounding="stochastic")
        return
    spec = dataclasses.replace(spec, rounding="stochastic")
    x = data(2, 3, 32, 32)
    draws = torch.stack([dequantize(quantize(x, spec, seed=7, stream=i)) for i in range(64)])
    step = step_of_each_element(quantize(x, spec))
    clipped = (x.abs() / step > 126) if spec.kind == "mxint8" else torch.zeros_like(x, dtype=torch.bool)
    assert bool((((draws - x).abs() <= step * 1.0001 + x.abs() * 2.0**-22) | clipped).all())
    mean_error = ((draws.mean(0) - x) / step)[~clipped]
    # One draw's error has a standard deviation of at most half a step: 64 draws of 6144 elements leave 0.0008 of bias.
    assert abs(float(mean_error.mean())) < 0.004
    assert float(mean_error.abs().mean()) < 0.08
    assert not torch.equal(draws[0], draws[1])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 300),
    kind=st.sampled_from(["int8", "int4", "int2"]),
    symmetric=st.booleans(),
    block=st.sampled_from([32, 64, 128, 256]),
    scale=st.sampled_from(["fp32", "bf16"]),
    magnitude=st.sampled_from([0.0, 1e-44, 1e-30, 1.0, 1e30, 3e38]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_any_finite_input_comes_back_finite_in_shape_and_dtype(
    n: int, kind, symmetric: bool, block: int, scale, magnitude: float, dtype: torch.dtype, seed: int
) -> None:
    spec = QuantSpec(kind=kind, symmetric=symmetric, block=block, scale=scale)
    x = (torch.rand(n, generator=torch.Generator().manual_seed(seed)) * magnitude).to(dtype)
    x = torch.where(torch.isfinite(x), x, torch.zeros_like(x))
    back = dequantize(quantize(x, spec))
    assert back.shape == x.shape
    assert back.dtype == dtype
    levels = 2 ** (spec.bits - 1) - 1
    bound = x.float().abs().max() / levels if n else torch.tensor(0.0)
    assert bool(((back.float() - x.float()).abs() <= bound * 1.01 + 2.0**-100).all())


def test_zeros_come_back_as_zeros_from_every_spec() -> None:
    for spec in [*INTEGER_SPECS, MXFP8, MASK1]:
        assert torch.equal(dequantize(quantize(torch.zeros(2, 2, 40, 32), spec)), torch.zeros(2, 2, 40, 32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", [INT8, INT4, INT2, MXINT8, MXFP8, MASK1], ids=str)
def test_a_bad_value_poisons_its_block_and_no_other(spec: QuantSpec, bad: float) -> None:
    x = data(1024)
    x[300] = bad
    back = dequantize(quantize(x, spec))
    assert spec.block is not None
    start = 300 // spec.block * spec.block
    inside = torch.zeros(1024, dtype=torch.bool)
    inside[start : start + spec.block] = True
    if spec.kind == "mask1":
        assert bool(torch.isfinite(back[~inside]).all())
        assert bool(back[inside].isnan().any())
        return
    assert bool(back[inside].isnan().all())
    clean = data(1024)
    assert torch.equal(back[~inside], dequantize(quantize(clean, spec))[~inside])


def test_a_bad_value_is_refused_where_the_spec_says_so() -> None:
    x = data(100)
    x[3] = float("nan")
    with pytest.raises(ConfigError, match="1 of 100 values are NaN"):
        quantize(x, dataclasses.replace(INT8, nonfinite="error"))


def test_a_range_too_wide_for_float32_poisons_rather_than_wraps() -> None:
    x = torch.tensor([3e38, -3e38] * 32)
    assert bool(dequantize(quantize(x, INT4)).isnan().all())
    assert bool(torch.isfinite(dequantize(quantize(x, INT8))).all())


def test_masks_and_two_valued_tensors_are_exact_in_one_bit() -> None:
    keep = torch.rand(5, 77, generator=torch.Generator().manual_seed(1)) > 0.3
    packed = quantize(keep, MASK1)
    assert torch.equal(dequantize(packed), keep)
    assert packed.nbytes == 448 // 8  # 385 bits in 7 blocks of 64
    for value in (1 / 0.7, -3.0, 1e-30):
        noise = keep.float() * value
        assert torch.equal(dequantize(quantize(noise, MASK1)), noise)


def test_sizes_are_what_the_format_promises() -> None:
    x = data(4, 8, 128, 64, dtype=torch.bfloat16)
    assert quantize(x, INT8).nbytes / x.nbytes == (1 + 2 / 64) / 2
    assert quantize(x, INT4).nbytes / x.nbytes == (0.5 + 4 / 64) / 2
    assert quantize(x, MXINT8).nbytes / x.nbytes == (1 + 1 / 32) / 2
    assert quantize(x, KIVI_KEY4).nbytes == quantize(x, INT4).nbytes


def test_key_layout_gives_each_channel_its_own_scale() -> None:
    keys = data(1, 2, 64, 32) * 0.01
    keys[..., 5] = 1000.0  # the outlier channel of KIVI, arXiv:2402.02750
    per_channel = (dequantize(quantize(keys, KIVI_KEY4)) - keys).abs()
    per_token = (dequantize(quantize(keys, KIVI_VALUE4)) - keys).abs()
    others = [c for c in range(32) if c != 5]
    assert per_channel[..., others].max() < 0.1 * keys[..., others].abs().max()
    assert per_token[..., others].max() > 0.5 * keys[..., others].abs().max()


def test_fp8_codes_agree_with_torch_for_every_representable_and_halfway_value() -> None:
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    exact = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(fp8_e4m3_decode(codes.to(torch.int32)), exact)
    assert torch.equal(fp8_e4m3_encode(exact).to(torch.uint8), codes)
    ordered = exact[exact >= 0].sort().values
    halfway = (ordered[1:] + ordered[:-1]) / 2
    around = torch.cat([halfway, halfway * (1 + 2**-20), halfway * (1 - 2**-20), -halfway, data(4096).clamp(-448, 448)])
    assert torch.equal(fp8_e4m3_encode(around).to(torch.uint8), around.to(torch.float8_e4m3fn).view(torch.uint8))
    assert fp8_e4m3_encode(torch.tensor([1e9])).item() == 0x7E  # saturates at 448, where torch's cast gives NaN


def test_bf16_neighbours_enclose_every_float() -> None:
    x = torch.cat([data(4096), data(4096) * 1e-30])
    down, up = floor_to_bf16(x), ceil_to_bf16(x.abs())
    assert torch.equal(down, down.bfloat16().float())
    assert torch.equal(up, up.bfloat16().float())
    assert bool((down <= x).all())
    assert bool((up >= x.abs()).all())
    assert bool((x - down <= x.abs() * 2.0**-7).all())
    assert float_bits(floor_to_bf16(torch.tensor([-0.0]))).item() == 0


def test_philox_gives_the_published_answers() -> None:
    """Known-answer vectors of Random123, the authors' library."""

    def words(counter: list[int], seed: int) -> list[int]:
        c = [torch.tensor([w]) for w in counter]
        return [int(w) for w in philox_4x32((c[0], c[1], c[2], c[3]), seed)]

    assert words([0, 0, 0, 0], 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words([0xFFFFFFFF] * 4, (1 << 64) - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert words([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0_A4093822) == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    ]  # fmt: skip


def test_randomness_is_a_function_of_seed_stream_and_element() -> None:
    device = torch.device("cpu")
    long = uniform(1001, 3, 5, device)
    assert torch.equal(long[:10], uniform(10, 3, 5, device))
    assert not torch.equal(long, uniform(1001, 3, 6, device))
    assert not torch.equal(long, uniform(1001, 4, 5, device))
    assert float(long.min()) >= 0
    assert float(long.max()) < 1


def test_blocks_never_cross_what_axis_keeps_apart() -> None:
    x = torch.arange(2 * 3 * 70).reshape(2, 3, 70).float()
    plan = blocking((2, 3, 70), QuantSpec(axis=(-1,), block=32))
    blocks = cut(x, plan)
    assert blocks.shape == (2 * 3 * 3, 32)
    assert torch.equal(blocks[2], torch.cat([x[0, 0, 64:], x[0, 0, -1:].expand(26)]))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"kind": "int3"}, "kind must be one of"),
        ({"block": 48}, "block must be 32"),
        ({"block": None}, "needs axis"),
        ({"axis": ()}, "at least one dimension"),
        ({"axis": (1, 1)}, "each once"),
        ({"kind": "mxint8"}, "is defined for"),
        ({"scale": "e8m0"}, "belongs to"),
        ({"kind": "mask1"}, "mask1 is exact"),
        ({"rounding": "up"}, "rounding must be one of"),
    ],
)
def test_a_spec_refuses_what_it_cannot_mean(settings_: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantSpec(**settings_)


def test_inputs_that_cannot_be_packed_are_refused_with_their_name() -> None:
    with pytest.raises(ConfigError, match=r"torch.int64 of shape \(3,\)"):
        quantize(torch.arange(3))
    with pytest.raises(ConfigError, match="does not fit"):
        quantize(data(4), KIVI_KEY4)
    with pytest.raises(ConfigError, match="seed takes 64 bits"):
        quantize(data(4), seed=-1)
    with pytest.raises(ConfigError, match="backend must be one of"):
        quantize(data(4), backend="cuda")


def test_running_range_clamps_where_the_published_scheme_wraps() -> None:
    quiet, loud = data(64, 32) * 0.01, data(64, 32)
    loud[0, 0] = loud.abs().max() * 2
    errors = {}
    for clamp in (True, False):
        running = RunningRange(RunningSpec(heads=4, clamp=clamp))
        running.quantize(quiet)
        back = dequantize_running(running.quantize(loud))
        errors[clamp] = float((back - loud)[0, 0].abs() / loud[0, 0].abs())
        if clamp:
            assert 0 < float(back[0, 0]) < float(loud[0, 0])  # cut off at the running maximum
    assert errors[True] != errors[False]


def test_running_range_keeps_the_range_it_packed_with() -> None:
    """Mesa unpacks with the current range, which a second forward has moved by then."""
    running = RunningRange(RunningSpec(heads=2, stochastic=False))
    x = data(16, 8)
    packed = running.quantize(x)
    before = dequantize_running(packed)
    running.quantize(data(16, 8, seed=9) * 100)
    assert torch.equal(dequantize_running(packed), before)
    assert float((before - x).abs().max()) <= float(x.max() - x.min()) / 255
