"""The universal checkpoint: format, writer, reader, reshard planner."""
