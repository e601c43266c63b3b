"""How results are kept: the record in MLflow, work in progress, locks, and code versions."""
