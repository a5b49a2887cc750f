"""The `holdfast` command: one module per verb; torch is imported only inside a verb that needs it."""

from holdfast.cli.dispatch import main

__all__ = ["main"]
