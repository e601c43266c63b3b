"""Public benchmarks: each one's files and figures, and (`…_run`) how `evaluate` runs it."""
