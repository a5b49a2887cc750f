"""Every private torch name we use still does what we use it for. A failure here means: read _torch_private.py first."""

from __future__ import annotations

import ast
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from holdfast.kernels import _torch_private as private


def test_a_watched_storage_is_seen_to_die_and_its_key_is_not_reused() -> None:
    x = torch.zeros(1000)
    watch = private.StorageWatch(x.untyped_storage())
    view = x.view(10, 100)
    assert watch.get() is not None
    del x
    assert watch.get() is not None
    del view
    assert watch.get() is None
    assert all(private.storage_key(torch.zeros(1000).untyped_storage()) != watch.key for _ in range(50))


def test_views_share_a_key_and_copies_do_not() -> None:
    x = torch.zeros(8)
    assert private.storage_key(x[2:].untyped_storage()) == private.storage_key(x.untyped_storage())
    copy = x.clone()
    assert private.storage_key(copy.untyped_storage()) != private.storage_key(x.untyped_storage())


def test_a_checkpointed_region_is_recognised_in_both_of_its_runs() -> None:
    seen = []

    def region(x: torch.Tensor) -> torch.Tensor:
        seen.append(private.checkpoint_is_saving())
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    checkpoint(region, x, use_reentrant=False).sum().backward()
    assert seen == [True, True]
    assert not private.checkpoint_is_saving()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert not private.checkpoint_is_saving()


def test_torch_functions_are_hidden_from_modes_where_we_ask() -> None:
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode(), private.without_torch_function():
        torch.zeros(2).sin()
    assert not seen


def test_no_saved_node_is_reported_outside_of_compilation() -> None:
    assert private.compiled_saved_node() is None


def test_private_names_are_used_in_one_file_only() -> None:
    package = Path(private.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        if path.name == "_torch_private.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if name.startswith(("torch._", "torch.Storage._", "torch.UntypedStorage._")):
                found.append(f"{path.name}: {name}")
    assert not found
