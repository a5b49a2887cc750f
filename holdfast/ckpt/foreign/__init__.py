"""Other people's checkpoints, opened: arrays that can be had in pieces, and objects. Nothing in them is executed."""

from holdfast.ckpt.foreign.source import Source, SourceArray

__all__ = ["Source", "SourceArray"]
