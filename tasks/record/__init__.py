"""How results are kept.

An *attempt* is one computation of a stage: a run of MLflow and the files that it wrote.

- It has a *fingerprint*, a digest of everything that its outputs depend on: code, settings, seed,
  the contents of what it read, and notes such as the base model's digest (`provenance`, `code`).
- It *counts* when its run is finished and complete; the manifest of its files is written last.
  Another run with the same fingerprint reuses it. The *current* attempt of a stage is the one that
  was made or reused last (`record`).
- It is *stale* when the stage would have another fingerprint now, or when what it read is not
  finished (`flows.states`). `staple accept` lets it stand for the new fingerprint if only code
  differs.

A stage runs in a `slot`. Until its attempt counts, it works in a folder of this machine (`work`),
where a killed process leaves its finished shards. One process writes an experiment (`writer`),
computes a fingerprint or uses a device (`locks`).
"""
