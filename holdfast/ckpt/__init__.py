"""The universal checkpoint: written at disk speed from any layout, read into any other, checked byte by byte."""

from holdfast.ckpt.catalog import StepInfo, is_sound, latest, list_steps, open_checkpoint
from holdfast.ckpt.cuts import LocalArray, Part
from holdfast.ckpt.live import load, save, save_async
from holdfast.ckpt.mesh import Mesh
from holdfast.ckpt.parityfile import Parity
from holdfast.ckpt.plan import WritePlan, plan_write
from holdfast.ckpt.reader import Checkpoint
from holdfast.ckpt.reshard import ReshardPlan, plan_reshard
from holdfast.ckpt.restore import Restored, RestoredRank, restore
from holdfast.ckpt.rules import Rule, Rules, load_rules
from holdfast.ckpt.verify import Damage, VerifyReport
from holdfast.ckpt.write import begin, commit, discard, write_fragments

__all__ = [
    "Checkpoint",
    "Damage",
    "LocalArray",
    "Mesh",
    "Parity",
    "Part",
    "ReshardPlan",
    "Restored",
    "RestoredRank",
    "Rule",
    "Rules",
    "StepInfo",
    "VerifyReport",
    "WritePlan",
    "begin",
    "commit",
    "discard",
    "is_sound",
    "latest",
    "list_steps",
    "load",
    "load_rules",
    "open_checkpoint",
    "plan_reshard",
    "plan_write",
    "restore",
    "save",
    "save_async",
    "write_fragments",
]
