"""Generation in process: how tokens are sampled, in which batches, and whether exactly."""
