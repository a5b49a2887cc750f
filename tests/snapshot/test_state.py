"""State is taken apart by name and put back bit for bit: training goes on as if it had never stopped."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from holdfast.errors import LayoutMismatch, StateError
from holdfast.objects import encode_object
from holdfast.snapshot.capture_plan import plan_capture, slot_view, source_of
from holdfast.snapshot.state import RNG, TrackedState, rng_states


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are done sooner by one thread than by several that wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def snapshot(state: TrackedState) -> tuple[Any, dict[str, bytes], dict[str, str]]:
    """What a capture takes: the stored specs, every array's bytes, and the texts."""
    rng = rng_states()
    plan = plan_capture(state.held(), 0)
    body = memoryview(bytearray(plan.nbytes))
    for part in plan.parts:
        slot_view(body, part.offset, part.nbytes, source_of(part).dtype, part.box.shape).copy_(source_of(part))
    arrays = {row.array: bytes(body[row.slot_offset : row.slot_offset + row.nbytes]) for row in plan.table}
    return plan.table.specs(), arrays, {**state.texts(), RNG: encode_object(rng, RNG)}


def restore(state: TrackedState, taken: tuple[Any, dict[str, bytes], dict[str, str]]) -> None:
    specs, arrays, texts = taken
    for item in state.prepare(specs):
        if item.local.numel():
            raw = torch.frombuffer(bytearray(arrays[item.name]), dtype=torch.uint8)
            with torch.no_grad():
                item.local.copy_(raw.view(item.local.dtype).view(item.local.shape))
    state.load_texts(texts)


def names(state: TrackedState) -> list[str]:
    return [item.name for item in state.held()]


class Net(nn.Module):
    """Tied weights, BatchNorm, dropout, a buffer and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen += tokens.numel()
        return self.head(self.frozen(self.body(self.embed(tokens))))


class Job:
    """Everything a training script has; one step draws from every generator."""

    def __init__(self, make: Callable[[nn.Module], dict[str, Any]], seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Net()
        self.objects = {"model": self.model, **make(self.model)}
        self.state = TrackedState(self.objects)

    def step(self) -> float:
        tokens = torch.randint(0, 11, (8,))
        target = torch.tensor([random.randrange(11) for _ in range(8)])
        weight = float(np.random.rand())
        loss = weight * nn.functional.cross_entropy(self.model(tokens), target)
        loss.backward()
        for item in self.objects.values():
            if isinstance(item, torch.optim.Optimizer):
                item.step()
                item.zero_grad()
        for item in self.objects.values():
            if isinstance(item, torch.optim.lr_scheduler.LRScheduler):
                item.step()
        return loss.item()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def with_optimizer(kind: type[torch.optim.Optimizer], **settings: Any) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda model: {"optim": kind(trained(model), **settings)}


def with_scheduler(model: nn.Module, kind: Callable[[Any], Any]) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    return {"optim": optimizer, "sched": kind(optimizer)}


def two_groups(model: Any) -> dict[str, Any]:
    groups = [{"params": model.embed.parameters(), "lr": 0.1}, {"params": model.body.parameters(), "weight_decay": 0.2}]
    return {"optim": torch.optim.AdamW(groups, lr=0.01)}


def two_optimizers(model: Any) -> dict[str, Any]:
    return {
        "dense": torch.optim.Adam(model.body.parameters(), amsgrad=True),
        "embed": torch.optim.SGD(model.embed.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    }


sched = torch.optim.lr_scheduler
JOBS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "none": lambda model: {},
    "sgd": with_optimizer(torch.optim.SGD, lr=0.1),
    "momentum": with_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": with_optimizer(torch.optim.Adam, lr=0.01),
    "adamw fused": with_optimizer(torch.optim.AdamW, lr=0.01, fused=True),
    "adagrad": with_optimizer(torch.optim.Adagrad, lr=0.01),
    "rmsprop": with_optimizer(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "lion-like": with_optimizer(torch.optim.Rprop, lr=0.01),
    "adafactor": with_optimizer(torch.optim.Adafactor, lr=0.01),
    "tensor lr": with_optimizer(torch.optim.Adam, lr=torch.tensor(0.01)),
    "two groups": two_groups,
    "two optimizers": two_optimizers,
    "cosine": lambda model: with_scheduler(model, lambda o: sched.CosineAnnealingLR(o, 20)),
    "warm-up": lambda model: with_scheduler(
        model, lambda o: sched.SequentialLR(o, [sched.LinearLR(o), sched.ExponentialLR(o, 0.9)], [2])
    ),
    "one cycle": lambda model: with_scheduler(model, lambda o: sched.OneCycleLR(o, 0.1, total_steps=30)),
    "lambda": lambda model: with_scheduler(model, lambda o: sched.LambdaLR(o, lambda epoch: 0.95**epoch)),
}


@pytest.mark.parametrize("kind", JOBS)
@pytest.mark.parametrize("steps_before", [1, 3])
def test_training_goes_on_as_if_it_had_never_stopped(kind: str, steps_before: int) -> None:
    job = Job(JOBS[kind])
    random.seed(1)
    np.random.seed(1)
    for _ in range(steps_before):
        job.step()
    taken = snapshot(job.state)
    expected = [job.step() for _ in range(4)]
    final = {item.name: item.local.clone() for item in job.state.held()}

    fresh = Job(JOBS[kind], seed=99)  # its optimizer has not made a step
    torch.manual_seed(5)
    restore(fresh.state, taken)
    assert [fresh.step() for _ in range(4)] == expected
    found = {item.name: item.local for item in fresh.state.held()}
    assert found.keys() == final.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in final.items())


def test_arrays_are_named_by_parameter_and_tied_weights_are_stored_once() -> None:
    job = Job(JOBS["adam"])
    job.step()
    found = names(job.state)
    assert "model/embed.weight" in found
    assert "model/head.weight" not in found
    assert "model/body.1.running_mean" in found
    assert "model/seen" in found
    assert "model/scratch" not in found
    assert {"optim/embed.weight/exp_avg", "optim/embed.weight/exp_avg_sq", "optim/embed.weight/step"} <= set(found)
    assert not any(name.startswith("optim/frozen") for name in found)


def test_only_what_the_optimizer_changes_may_be_copied_late() -> None:
    job = Job(JOBS["adam"])
    job.step()
    lazy = {item.name: item.lazy for item in job.state.held()}
    assert lazy["model/embed.weight"]
    assert lazy["model/frozen.weight"]
    assert lazy["optim/embed.weight/exp_avg"]
    assert not lazy["model/body.1.running_mean"]
    assert not lazy["model/seen"]
    assert not lazy["optim/embed.weight/step"]
    untracked = {item.name: item.lazy for item in Job(JOBS["none"]).state.held()}
    assert not untracked["model/embed.weight"], "somebody else changes it, and we have no fence there"


def test_one_optimizer_over_two_modules_keeps_their_parameters_apart() -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = torch.optim.Adam([*one.parameters(), *other.parameters()])
    (one(torch.ones(3)) + other(torch.ones(3))).sum().backward()
    optimizer.step()
    state = TrackedState({"one": one, "other": other, "optim": optimizer})
    assert {"optim/one.weight/exp_avg", "optim/other.weight/exp_avg"} <= set(names(state))


def test_parameters_of_no_module_are_named_by_their_place_and_come_back_with_their_state() -> None:
    loose = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([loose])
    loose.sum().backward()
    optimizer.step()
    state = TrackedState({"optim": optimizer})
    assert {"optim/group-0.param-0/exp_avg", "optim/group-0.param-0/parameter"} <= set(names(state))
    taken, was = snapshot(state), loose.detach().clone()
    loose.sum().backward()
    optimizer.step()
    restore(state, taken)
    assert loose.equal(was)
    fresh = nn.Parameter(torch.zeros(3))
    again = torch.optim.Adam([fresh])
    restore(TrackedState({"optim": again}), taken)
    assert fresh.equal(was)
    assert again.state[fresh].keys() == optimizer.state[loose].keys()


def test_a_parameter_that_another_object_brings_is_not_captured_twice() -> None:
    class Table:
        def __init__(self) -> None:
            self.rows = nn.Parameter(torch.ones(3, 5))

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"rows": self.rows.detach().clone()}

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            with torch.no_grad():
                self.rows.copy_(state["rows"])

    table = Table()
    assert not [
        name for name in names(TrackedState({"table": table, "optim": torch.optim.SGD([table.rows])})) if "optim" in name
    ]


class Copying(nn.Linear):
    """Its state dict is made of copies, as that of FSDP1 and of some quantized layers is."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self._register_state_dict_hook(lambda module, state, prefix, meta: {key: value.clone() for key, value in state.items()})


class TwoInOne(torch.Tensor):
    """Stands for the tensors of quantization libraries, whose bytes are in other tensors inside."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None


def holding(tensor: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("b", tensor)
    return module


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Copying, "parameter weight is not in the module's state_dict, or only as a copy"),
        (lambda: nn.Linear(2, 2, device="meta"), "m/weight is on the meta device"),
        (lambda: nn.LazyLinear(2), "m/weight has no shape yet"),
        (lambda: holding(torch.eye(2).to_sparse()), "m/b is sparse_coo"),
        (lambda: holding(torch.ones(1, 2).expand(2, 2)), "m/b is expanded"),
        (lambda: holding(torch.ones(2, dtype=torch.complex64).conj()), "m/b is a view that is conjugated"),
        (lambda: holding(torch.eye(2).as_subclass(TwoInOne)), "m/b is a TwoInOne, which is made of several tensors"),
    ],
)
def test_what_cannot_be_put_back_byte_by_byte_is_refused_at_the_start(make, words) -> None:
    with pytest.raises(StateError, match=words):
        TrackedState({"m": make()})


@pytest.mark.filterwarnings("ignore")  # torch's own: about jit, and about FSDP1 itself
def test_wrappers_of_torch_that_keep_state_out_of_sight_are_refused_with_what_to_use_instead() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(2, 2)
        with pytest.raises(StateError, match=r"'optim' is a ZeroRedundancyOptimizer.*fully_shard"):
            TrackedState({"model": model, "optim": ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)})
        with pytest.raises(StateError, match=r"'model' holds FullyShardedDataParallel \(FSDP1\).*fully_shard"):
            TrackedState({"model": nn.Sequential(FullyShardedDataParallel(model, device_id=torch.device("cpu")))})
    finally:
        dist.destroy_process_group()


def test_a_parameters_state_has_its_keys_in_the_order_in_which_the_optimizer_made_them() -> None:
    def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = trained()
    specs, arrays, texts = snapshot(TrackedState({"model": model, "optim": optimizer}))
    fresh = nn.Linear(2, 2)
    again = torch.optim.AdamW(fresh.parameters())
    other_way_round = dict(reversed(specs.items()))  # as where other ranks own the first ones
    restore(TrackedState({"model": fresh, "optim": again}), (other_way_round, arrays, texts))
    assert [list(state) for state in again.state.values()] == [list(state) for state in optimizer.state.values()]


def test_parameters_that_ddp_ignores_are_this_ranks_own() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.ModuleDict({"shared": nn.Linear(2, 2), "expert": nn.Linear(2, 2)})
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["expert.weight", "expert.bias"])
        replicated = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(replicated.parameters(), lr=0.1, momentum=0.9)
        sum(part(torch.ones(1, 2)).sum() for part in model.values()).backward()
        optimizer.step()
        held = {item.name: item.placement.expected for item in TrackedState({"model": replicated, "optim": optimizer}).held()}
    finally:
        dist.destroy_process_group()
    assert len(held) == 8
    assert {name: ranks for name, ranks in held.items() if name.startswith("model/shared") and ranks != (0,)} == {}
    assert {name: ranks for name, ranks in held.items() if "expert" in name and ranks != ()} == {}


def test_what_a_hook_adds_to_a_state_dict_comes_back() -> None:
    def add(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
        state[f"{prefix}scale"] = torch.tensor([module.scale])

    def take(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}scale" in state:
            module.scale = float(state.pop(f"{prefix}scale"))

    model = nn.Linear(2, 2)
    model.scale = 0.5  # type: ignore[assignment]
    model._register_state_dict_hook(add)
    model.register_load_state_dict_pre_hook(take)
    state = TrackedState({"model": model})
    taken = snapshot(state)
    model.scale = 4.0  # type: ignore[assignment]
    restore(state, taken)
    assert model.scale == 0.5


def test_stages_and_experts_of_other_ranks_are_no_mismatch_and_settings_are_gathered_from_all() -> None:
    """Two ranks with a layer each become one with both, and back again."""

    def rank(*layers: int, lr: float = 0.1) -> TrackedState:
        model = nn.ModuleDict({str(layer): nn.Linear(2, 2) for layer in layers})
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        sum(part(torch.ones(1, 2)).sum() for part in model.values()).backward()
        optimizer.step()
        return TrackedState({"model": model, "optim": optimizer})

    ranks = [rank(0, lr=0.3), rank(1, lr=0.3)]
    stored = {name: spec for part in ranks for name, spec in snapshot(part)[0].items()}
    texts = [part.texts() for part in ranks]
    elsewhere = {name for part in ranks for name in (*names(part), *part.optimized())}
    with pytest.raises(LayoutMismatch, match=r"model/1\.bias"):
        rank(0).prepare(stored)
    assert {item.name for item in rank(0).prepare(stored, elsewhere)} == set(names(ranks[0]))
    both = rank(0, 1)
    assert {item.name for item in both.prepare(stored, elsewhere)} == stored.keys()
    with pytest.raises(LayoutMismatch, match="build the optimizer as it was built before"):
        both.load_texts(texts[0])
    both.load_texts(texts[0], texts)
    assert both.optimizers["optim"].param_groups[0]["lr"] == 0.3
    parted = rank(1)
    parted.load_texts(both.texts(), [both.texts()])
    assert parted.optimizers["optim"].param_groups[0]["lr"] == 0.3
    uneven = [rank(0, lr=0.3).texts(), rank(1, lr=0.5).texts()]
    with pytest.raises(
        LayoutMismatch, match=r"0\.weight and 1\.weight are in one parameter group here and had different settings"
    ):
        both.load_texts(uneven[0], uneven)


def test_modules_added_later_appear_in_the_next_look_and_change_the_signature() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)
    state = TrackedState({"model": model})
    before = state.signature()
    model.append(nn.Linear(3, 2, bias=False))  # as LoRA does
    assert state.signature() != before
    assert "model/1.weight" in names(state)


# -- plain objects -------------------------------------------------------------------------------------------------------


class Average:
    """An average of weights that hands out copies, as careful code does; lazily made when `width` is None."""

    def __init__(self, rows: int | None = 200) -> None:
        self.value = None if rows is None else torch.randn(rows, 100)
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        value = None if self.value is None else self.value.clone()
        return {"shadow": {"w": value}, "count": self.count, "small": torch.arange(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.count = state["shadow"]["w"], state["count"]


def test_what_is_held_is_looked_at_anew_only_when_something_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrackedState({"model": model, "optim": optimizer})
    looks: list[int] = []
    look = state._of_modules
    monkeypatch.setattr(state, "_of_modules", lambda: looks.append(1) or look())

    def held_anew() -> bool:
        before = len(looks)
        fresh = TrackedState({"model": model, "optim": optimizer}).held()
        assert [(item.placement, item.lazy, id(item.tensor)) for item in state.held()] == [
            (item.placement, item.lazy, id(item.tensor)) for item in fresh
        ], "kept or not, it is what is there"
        return len(looks) > before

    assert not held_anew()
    model(torch.randn(8, 4)).sum().backward()
    assert not held_anew()
    optimizer.step()
    assert held_anew(), "the optimizer has state now"
    assert not held_anew()
    optimizer.load_state_dict(optimizer.state_dict())
    assert held_anew(), "its state is in other tensors"
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    assert held_anew(), "parameters are other tensors"
    model.double()
    assert held_anew(), "the tensors are the same, and hold another type"
    model[0].weight.requires_grad_(False)
    optimizer.param_groups[0]["params"] = list(model[1].parameters())
    assert held_anew(), "the optimizer has other parameters"
    model[0].weight.requires_grad_(True)
    assert held_anew(), "what nobody trains may be changed by anybody"
    model.append(nn.Linear(4, 2))
    assert held_anew()
    assert not held_anew()


def test_a_name_that_clashes_is_refused_each_time() -> None:
    model = nn.Linear(2, 2)
    state = TrackedState({"model": model})
    model.register_parameter("a/b", nn.Parameter(torch.ones(1)))
    model.register_parameter("a", nn.Parameter(torch.ones(1)))
    for _ in range(2):
        with pytest.raises(StateError, match="cannot also be the folder"):
            state.held()


@pytest.mark.parametrize("rows_there", [200, 300, 100, None], ids=["same", "larger", "smaller", "not made yet"])
def test_large_tensors_of_plain_objects_come_back_whatever_the_fresh_object_holds(rows_there: int | None) -> None:
    average = Average()
    average.count = 7
    state = TrackedState({"ema": average})
    assert names(state) == ["ema/shadow/w"]
    taken = snapshot(state)
    fresh = Average(rows_there)
    restore(TrackedState({"ema": fresh}), taken)
    assert fresh.value is not None
    assert torch.equal(fresh.value, average.value)
    assert fresh.count == 7


class Holder:
    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize(
    "value",
    [
        OrderedDict([("b", 1), ("a", OrderedDict(x=(1, 2)))]),
        {"a": [1, (2, 3)], 5: {"x"}, (1, 2): b"\0"},
        {"shape": torch.Size([2, 3]), "dtype": torch.bfloat16, "nothing": None},
        [float("inf"), -0.0, 1e-320],
        {},
    ],
)
def test_values_of_plain_objects_come_back_equal_and_of_the_same_type(value: Any) -> None:
    holder = Holder(copy.deepcopy(value))
    taken = snapshot(TrackedState({"it": holder}))
    fresh = Holder({})
    restore(TrackedState({"it": fresh}), taken)
    assert fresh.value == value
    assert repr(fresh.value) == repr(value)


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize("value", [{"it": object()}, {"pair": Pair(1, 2)}, {"f": len}])
def test_what_has_no_typed_form_is_refused_when_it_is_given_and_not_at_the_first_snapshot(value: Any) -> None:
    with pytest.raises(StateError, match="has no typed form"):
        TrackedState({"it": Holder(value)})


class Scaled(nn.Linear):
    """Keeps a history as a tensor made anew each time, as FP8 layers do."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.history = [0.0]

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.history)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.history = state.tolist()


def test_extra_state_of_a_module_is_taken_anew_and_given_back() -> None:
    module = Scaled()
    state = TrackedState({"model": module})
    snapshot(state)
    module.history = [1.0, 2.0, 3.0]
    taken = snapshot(state)
    fresh = Scaled()
    restore(TrackedState({"model": fresh}), taken)
    assert fresh.history == [1.0, 2.0, 3.0]
    assert torch.equal(fresh.weight, module.weight)


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ({}, "was given no state"),
        ({"a/b": nn.Linear(1, 1)}, "cannot name an object"),
        ({"a@b": nn.Linear(1, 1)}, "cannot name an object"),
        ({3: nn.Linear(1, 1)}, "cannot name an object"),
        ({RNG: nn.Linear(1, 1)}, "taken by the random generators"),
        ({"n": 5}, "is a int without state_dict and load_state_dict"),
    ],
)
def test_what_cannot_be_captured_is_refused_with_the_way_out(objects: Any, words: str) -> None:
    with pytest.raises(StateError, match=words):
        TrackedState(objects)


def test_names_that_would_clash_are_refused() -> None:
    class Clash(Average):
        def state_dict(self) -> dict[str, Any]:
            large = torch.zeros(200, 100)
            return {"x/y": large, "x": {"y": large.clone()}}

    with pytest.raises(StateError, match="two tensors would be stored as 'it/x/y'"):
        TrackedState({"it": Clash()})

    class Folder(Average):
        def state_dict(self) -> dict[str, Any]:
            large = torch.zeros(200, 100)
            return {"x": large, "x/y": large.clone()}

    with pytest.raises(StateError, match="'it/x' is an array and cannot also be the folder of 'it/x/y'"):
        TrackedState({"it": Folder()})


def test_a_snapshot_of_another_model_is_refused_with_both_sides_named() -> None:
    taken = snapshot(TrackedState({"model": nn.Linear(3, 3)}))
    with pytest.raises(LayoutMismatch, match=r"1 \(model/1.weight\) only here|only here, .*only in the snapshot"):
        restore(TrackedState({"model": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))}), taken)
    with pytest.raises(LayoutMismatch, match=r"model/weight is float32\[4, 3\] here and float32\[3, 3\] in the snapshot"):
        restore(TrackedState({"model": nn.Linear(3, 4)}), taken)


def test_parameter_groups_in_another_order_are_refused() -> None:
    def build(order: int) -> TrackedState:
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        params = list(model.parameters())[::order]
        optimizer = torch.optim.Adam([{"params": [param]} for param in params])
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        return TrackedState({"model": model, "optim": optimizer})

    taken = snapshot(build(1))
    with pytest.raises(
        LayoutMismatch, match="2 parameter groups over 2 parameters, this optimizer 2 over 2, or in another order"
    ):
        restore(build(-1), taken)


def test_an_object_that_the_snapshot_does_not_have_is_named() -> None:
    taken = snapshot(TrackedState({"a": Holder({})}))
    with pytest.raises(LayoutMismatch, match="no object 'b'"):
        restore(TrackedState({"a": Holder({}), "b": Holder({})}), taken)
