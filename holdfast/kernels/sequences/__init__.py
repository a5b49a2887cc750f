"""Long sequences: past keys and values in few bits, backward chunk by chunk, choices under a byte budget."""

from holdfast.kernels.plan import Choice, Group, Option, Plan, solve_budget
from holdfast.kernels.sequences.context import ChunkContext
from holdfast.kernels.sequences.driver import ChunkedResult, chunked_backward
from holdfast.kernels.sequences.gear import GearSpec
from holdfast.kernels.sequences.store import ChunkKVStore, KVSpec
from holdfast.kernels.sequences.tokens import TokenWise, measure_treatments

__all__ = [
    "Choice",
    "ChunkContext",
    "ChunkKVStore",
    "ChunkedResult",
    "GearSpec",
    "Group",
    "KVSpec",
    "Option",
    "Plan",
    "TokenWise",
    "chunked_backward",
    "measure_treatments",
    "solve_budget",
]
