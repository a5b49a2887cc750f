"""The universal checkpoint: written at disk speed from any layout, read into any other, checked byte by byte."""

from holdfast.ckpt.catalog import StepInfo, is_sound, latest, list_steps, open_checkpoint
from holdfast.ckpt.plan import WritePlan, plan_write
from holdfast.ckpt.reader import Checkpoint
from holdfast.ckpt.verify import Damage, VerifyReport
from holdfast.ckpt.write import begin, commit, write_fragments

__all__ = [
    "Checkpoint",
    "Damage",
    "StepInfo",
    "VerifyReport",
    "WritePlan",
    "begin",
    "commit",
    "is_sound",
    "latest",
    "list_steps",
    "open_checkpoint",
    "plan_write",
    "write_fragments",
]
