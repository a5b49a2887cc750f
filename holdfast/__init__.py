"""holdfast keeps a distributed PyTorch training job alive and loses none of its work.

Importing this package starts no thread and loads neither torch nor Ray; what a call needs is loaded by the call.
"""

from holdfast.errors import (
    CallerError,
    CheckpointFailed,
    ClusterError,
    ConfigError,
    CorruptData,
    HoldfastError,
    KeeperUnreachable,
    LayoutMismatch,
    MissingData,
    NotACheckpoint,
    OutOfSharedMemory,
    PoisonedState,
    RayUnreachable,
    SnapshotLost,
    StaleEpoch,
    StateError,
    StorageError,
    UnsupportedFormat,
)
from holdfast.events import Event, subscribe
from holdfast.protect import loader, protect
from holdfast.redundancy import Redundancy, Stage

__version__ = "0.1.0"

__all__ = [
    "CallerError",
    "CheckpointFailed",
    "ClusterError",
    "ConfigError",
    "CorruptData",
    "Event",
    "HoldfastError",
    "KeeperUnreachable",
    "LayoutMismatch",
    "MissingData",
    "NotACheckpoint",
    "OutOfSharedMemory",
    "PoisonedState",
    "RayUnreachable",
    "Redundancy",
    "SnapshotLost",
    "Stage",
    "StaleEpoch",
    "StateError",
    "StorageError",
    "UnsupportedFormat",
    "__version__",
    "loader",
    "protect",
    "subscribe",
]
