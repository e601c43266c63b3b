"""Similarities f(y, yG) to the gold response: one file each, listed in `registry`."""
