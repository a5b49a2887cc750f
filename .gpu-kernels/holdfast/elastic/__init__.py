"""Membership, faults, recovery and the launcher shim."""
