"""Every error holdfast raises on purpose, divided by who can act on it.

The caller can change an argument, the storage can be repaired or replaced, the cluster can be given time or nodes. A message
names the thing, where it is, what was expected and found, and the next step to take.
"""

from __future__ import annotations


class HoldfastError(Exception):
    """Base of all errors below. `exit_code` is what the command line ends with (0 ok, 1 failed, 2 usage, …)."""

    exit_code = 1


# -- the caller can act ------------------------------------------------------------------------------------------------


class CallerError(HoldfastError):
    """An argument, a setting or the training script has to change."""

    exit_code = 2


class ConfigError(CallerError):
    """A setting is outside what is accepted, or the environment lacks what the setting asks for."""


class StateError(CallerError):
    """The state given to `protect` cannot be captured: empty, without `state_dict`, or with clashing names."""


class LayoutMismatch(CallerError):
    """Two layouts that have to agree do not: ranks differ in structure, or a checkpoint does not fit the target."""


class PoisonedState(CallerError):
    """Parameters have become NaN or infinite, and the run was told to go back to the last clean snapshot."""

    exit_code = 1


# -- the storage can act -----------------------------------------------------------------------------------------------


class StorageError(HoldfastError):
    """A file, a slot or a checkpoint is absent or cannot be trusted."""


class NotACheckpoint(StorageError):
    """The path holds no universal checkpoint, or one that was never committed."""

    exit_code = 3


class UnsupportedFormat(StorageError):
    """The checkpoint has a version this release does not read, or breaks the rules of its own format."""


class MissingData(StorageError):
    """Bytes that should exist do not: a file is gone or too short."""

    exit_code = 5


class CorruptData(StorageError):
    """Bytes are there but are not the ones that were written."""

    exit_code = 5


class CheckpointFailed(StorageError):
    """A run ended well and its last step could not be written; it is kept in memory, and nowhere else."""


# -- the cluster can act -----------------------------------------------------------------------------------------------


class ClusterError(HoldfastError):
    """A keeper, a node or Ray is out of reach or out of room."""


class KeeperUnreachable(ClusterError):
    """No keeper answers for a node."""


class RayUnreachable(ClusterError):
    """Ray cannot be started or reached."""


class OutOfSharedMemory(ClusterError):
    """The place for slots is too small for two snapshots of every local rank and the parity."""


class StaleEpoch(ClusterError):
    """A message from an older membership: its sender has been replaced and must stop."""


class QuorumLost(ClusterError):
    """Fewer replicas of the rendezvous answer than are needed to be sure of anything."""


class SnapshotLost(ClusterError):
    """More was lost than the redundancy covers, and no checkpoint is left to fall back to."""

    exit_code = 5


def error_named(name: str) -> type[HoldfastError] | None:
    """The class of that name, for an error that another process has put into words; None where there is none."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, HoldfastError) else None
