"""SAMI's stages: write a constitution, sample responses under it, train, evaluate."""
