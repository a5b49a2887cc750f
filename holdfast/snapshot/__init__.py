"""Snapshots in memory: capture, slots, keepers, parity, commit, recovery."""

from holdfast.snapshot.cluster import Cleared, JobStatus, LocalRay, NodeStatus, down, status, up

__all__ = ["Cleared", "JobStatus", "LocalRay", "NodeStatus", "down", "status", "up"]
