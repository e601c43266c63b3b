"""Pure functions that `tasks.cluster` calls."""
