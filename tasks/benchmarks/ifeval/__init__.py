"""IFEval."""
