"""Training: bases, adapters, examples, objectives, the loop, and the export of what it made."""
