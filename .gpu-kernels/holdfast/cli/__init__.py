"""The `holdfast` command: one module per verb; torch is imported only inside a verb that needs it."""
