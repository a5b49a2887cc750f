"""Typed JSON: what goes in comes out equal and of the same type; what was never written is refused; nothing is executed."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.arrays import ITEMSIZE
from holdfast.errors import CorruptData, StateError
from holdfast.objects import decode_object, encode_object

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters())
    | st.binary(max_size=40)
    | st.binary(max_size=40).map(bytearray)
)
keys = (
    st.text(max_size=8)
    | st.integers()
    | st.booleans()
    | st.sampled_from(["$tuple", "$", ""])
    | st.tuples(st.integers(), st.text())
)
values = st.recursive(
    scalars | st.sets(st.integers() | st.text(max_size=4)) | st.frozensets(st.integers()),
    lambda parts: (
        st.lists(parts, max_size=4)
        | st.lists(parts, max_size=4).map(tuple)
        | st.dictionaries(keys, parts, max_size=4)
        | st.dictionaries(keys, parts, max_size=4).map(OrderedDict)
    ),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """Equal, of the same type, all the way down; NaN equals NaN, and 0.0 does not equal -0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or one.hex() == other.hex()
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and encode_object(one) == encode_object(other)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def through_json(value: Any) -> Any:
    text = encode_object(value)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return decode_object(text)


# -- round trips -------------------------------------------------------------------------------------------------------


@given(values)
def test_values_come_back_equal_and_of_the_same_type(value: Any) -> None:
    assert same(through_json(value), value)


@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3)])
def test_tensors_of_every_dtype_and_shape_come_back(dtype: str, shape: tuple[int, ...]) -> None:
    raw = torch.arange(math.prod(shape) * getattr(torch, dtype).itemsize, dtype=torch.uint8) % 2
    tensor = raw.view(getattr(torch, dtype)).reshape(shape)
    assert same(through_json(tensor), tensor)


def test_a_tensor_comes_back_dense_and_detached_whatever_view_it_was() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    conjugate = torch.tensor([1 + 2j, 3 - 4j]).conj()
    for view in [base.t(), base[:, ::2], base[1:2].expand(3, 4), conjugate, conjugate.imag]:
        assert torch.equal(through_json(view), view)
    assert not through_json(torch.nn.Parameter(base)).requires_grad


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.array(3.5, np.float16),
        np.zeros((0, 2)),
        np.array(["a", "bcd"]),
        np.array([True, False]),
        np.array(["2026-01-01"], "datetime64[D]"),
        np.arange(12).reshape(3, 4).T,
        np.float32(0.1),
        np.int64(-3),
        np.bool_(True),
    ],
    ids=repr,
)
def test_numpy_values_come_back(array: Any) -> None:
    assert same(through_json(array), array)


def test_values_of_torch_itself_come_back() -> None:
    for value in [torch.bfloat16, torch.device("cuda", 3), torch.Size([2, 3]), torch.Size([])]:
        assert same(through_json(value), value)


def test_a_dictionary_of_another_class_keeps_its_items() -> None:
    assert same(through_json(defaultdict(list, a=[1])), {"a": [1]})


# -- what training jobs keep -------------------------------------------------------------------------------------------


def test_random_number_generators_go_on_where_they_stopped() -> None:
    python, legacy, modern = random.Random(3), np.random.RandomState(3), np.random.default_rng(3)
    device = torch.Generator().manual_seed(3)
    python.gauss(0, 1), legacy.standard_normal()  # Python and numpy hold the second normal back in their state
    states = through_json(
        {
            "python": python.getstate(),
            "legacy": legacy.get_state(),
            "modern": modern.bit_generator.state,
            "torch": device.get_state(),
        }
    )
    expected = (python.gauss(0, 1), legacy.standard_normal(), modern.random(), torch.rand(3, generator=device))
    python.setstate(states["python"])
    legacy.set_state(states["legacy"])
    modern.bit_generator.state = states["modern"]
    device.set_state(states["torch"])
    assert (python.gauss(0, 1), legacy.standard_normal(), modern.random()) == expected[:3]
    assert torch.equal(torch.rand(3, generator=device), expected[3])


@pytest.mark.parametrize("bit_generator", [np.random.MT19937, np.random.Philox, np.random.SFC64, np.random.PCG64DXSM])
def test_every_numpy_bit_generator_goes_on_where_it_stopped(bit_generator: Any) -> None:
    generator, other = np.random.Generator(bit_generator(5)), np.random.Generator(bit_generator(6))
    generator.random(7)
    other.bit_generator.state = through_json(generator.bit_generator.state)
    assert other.random(5).tolist() == generator.random(5).tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=30),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
        ),
    ],
    ids=["StepLR", "MultiStepLR", "OneCycleLR", "ReduceLROnPlateau", "CosineAnnealingWarmRestarts", "SequentialLR"],
)
def test_schedulers_go_on_where_they_stopped(make: Any) -> None:
    def build() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        return optimizer, make(optimizer)

    def advance(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    optimizer, scheduler = build()
    advance(optimizer, scheduler, 4)
    kept = encode_object({"sched": scheduler.state_dict(), "optim": optimizer.state_dict()})
    expected = advance(optimizer, scheduler, 6)
    optimizer, scheduler = build()
    state = decode_object(kept)
    optimizer.load_state_dict(state["optim"])
    scheduler.load_state_dict(state["sched"])
    assert advance(optimizer, scheduler, 6) == expected


# -- what has no typed form --------------------------------------------------------------------------------------------


class Opaque:
    pass


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [0, Opaque()]}, r"state\.a\[1\] is a .*Opaque"),
        ({"hook": print}, r"state\.hook is a builtins\.builtin_function"),
        ({"a": np.array([None])}, r"state\.a is a numpy array of Python objects"),
        ({"a": np.zeros(2, [("x", "i4"), ("y", "f8")])}, r"state\.a is a numpy array of records"),
        ({"a": type}, r"state\.a is a builtins\.type"),
    ],
)
def test_a_value_without_typed_form_is_named_by_its_path(value: Any, where: str) -> None:
    with pytest.raises(StateError, match=where):
        encode_object(value, "state")


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(StateError, match="contains itself"):
        encode_object(loop, "state")


# -- hostile text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\x00",
        "[1,]",
        b"\xff\xfe",
        "[" * 100_000,
        '{"$pickle": "gASVBQ=="}',
        '{"$tuple": [], "other": 1}',
        '{"$tuple": 3}',
        '{"$float": "one"}',
        '{"$float": [1]}',
        '{"$bytes": "not base64!"}',
        '{"$bytes": 7}',
        '{"$set": [[1]]}',
        '{"$dict": [[[1], 2]]}',
        '{"$dict": [[1, 2, 3]]}',
        '{"$complex": ["1"]}',
        '{"$array": ["|O", [1], "AAAAAAAAAAA="]}',
        '{"$array": [[["x", "|O"]], [1], "AAAAAAAAAAA="]}',
        '{"$array": ["<i4", [2], "AAAA"]}',
        '{"$array": ["<i4", [18446744073709551616], "AAAAAA=="]}',
        '{"$array": ["no such dtype", [1], "AAAA"]}',
        '{"$array": ["(", [1], "AAAA"]}',
        '{"$scalar": ["<i4", [], ""]}',
        '{"$tensor": ["float32", [1], "AAAA"]}',
        '{"$tensor": ["float32", [3], "AAAAAAAAAAA="]}',
        '{"$tensor": ["float32", [18446744073709551616], "AAAAAA=="]}',
        '{"$tensor": ["load", [1], "AAAA"]}',
        '{"$tensor": [3, [1], "AAAA"]}',
        '{"$torch.dtype": "torch.load"}',
        '{"$torch.dtype": 5}',
        '{"$torch.device": "abacus:0"}',
        '{"$torch.Size": ["x"]}',
        '{"$torch.Size": [1e999]}',
        "NaN",
        "[Infinity]",
    ],
    ids=lambda text: repr(text)[:50],
)
def test_text_that_was_never_written_is_refused(text: str | bytes) -> None:
    with pytest.raises(CorruptData, match="not typed JSON"):
        decode_object(text)


@given(values, st.data())
def test_damaged_text_is_refused_or_another_value(value: Any, data: st.DataObject) -> None:
    text = bytearray(encode_object(value).encode())
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CorruptData):
        encode_object(decode_object(bytes(text)))
