"""Snapshots in memory: capture, slots, keepers, parity, commit, recovery."""
