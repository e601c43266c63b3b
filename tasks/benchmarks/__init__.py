"""Public benchmarks, a folder each: `data` reads its files, `run` is how `evaluate` runs it."""
