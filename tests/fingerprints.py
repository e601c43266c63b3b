"""The fingerprints of three experiments' stages, as an edited copy of the project computes them.

`python tests/fingerprints.py` reads edits, as JSON, from its input: {name: [file, old, new]}. Each
is made in a copy of the packages, in a process of its own that imports the project from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("constitutions", "models", "tasks", "flows")
ENDPOINT = "http://localhost:1/v1"
JUDGE = {"policy": {"model": "judge", "endpoint": ENDPOINT}, "rubric": "helpfulness"}
OWN: dict[str, Any] = {
    "experiment": "own",
    "policy": {"model": "model"},
    "prompts": {"sources": [{"path": "rows.jsonl"}]},
    "score": {"similarity": "judge", "judge": {"kind": "absolute", **JUDGE}},
    "cluster": {"features": ["effect", "sentences"]},
    "evaluate": {
        "judge": {"kind": "pairwise", **JUDGE},
        "benchmarks": {"ifeval": {"prompts": "ifeval.jsonl"}},
    },
}
EXPERIMENTS = {"planted": "planted", "own": json.dumps(OWN), "sami": "planted-sami"}
"""The preset; rows of one's own, graded, judged and measured by IFEval; SAMI's preset."""

Fingerprints = dict[str, dict[str, list[str]]]
"""Experiment → stage → its fingerprints in iterations 0 and 1."""


def fingerprints() -> Fingerprints:
    """Of the project that lies in the working directory, where it is imported from."""
    import flows.experiment
    from flows.em import steps
    from flows.settings import load_settings
    from flows.states import Look
    from models.worlds.registry import WORLD_MODELS
    from tasks.policies.base import BaseModelFiles, _recorded_name

    def kept_model(settings: Any, seed: int, *_: Any) -> BaseModelFiles:
        of_world = settings.model in WORLD_MODELS
        name = _recorded_name(settings.model, seed) if of_world else settings.model
        return BaseModelFiles("model", name)

    flows.experiment.kept_model = kept_model  # type: ignore[attr-defined, assignment]
    shutil.copy(ROOT / "tests" / "fingerprints.py", "rows.jsonl")  # its digest is all that counts
    found: Fingerprints = {}
    for name, source in EXPERIMENTS.items():
        text = source if source.startswith("{") else None
        settings = load_settings(name if text else source, text=text)
        record: Any = SimpleNamespace(
            experiment=name,
            experiment_id=name,
            tracking_uri=name,
            home=Path("home"),
            runs=lambda **_tags: [],
            all_changes=dict,
        )
        look = Look(record)
        experiment = flows.experiment.Experiment(settings, record, look=look)
        found[name] = {}
        for t in (0, 1):
            for _ in steps(experiment, t):
                pass
        for (stage, _), state in look.states.items():
            assert state.wanted
            found[name].setdefault(stage, []).append(state.wanted.fingerprint)
    return found


def edited(file: str, old: str, new: str) -> Fingerprints:
    """The fingerprints after an edit, in a process that has imported nothing of the project."""
    with tempfile.TemporaryDirectory() as folder:
        for package in PACKAGES:
            shutil.copytree(ROOT / package, Path(folder, package))
        path = Path(folder, file)
        path.write_text(path.read_text("utf-8").replace(old, new, 1), "utf-8")
        reading, writing = os.pipe()
        if os.fork() == 0:
            try:
                os.chdir(folder)
                sys.path[0] = folder
                os.write(writing, json.dumps(fingerprints()).encode())
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            found: Fingerprints = json.loads(answer.read())
        os.wait()
        return found


if __name__ == "__main__":
    edits = json.load(sys.stdin)
    for file, old, _ in edits.values():
        assert old in (ROOT / file).read_text("utf-8"), f"{file} has no {old!r} to edit"
    sys.path[0] = str(ROOT)
    import prefect

    prefect.flow = prefect.task = lambda *_, **__: lambda function: function  # type: ignore
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        fingerprints()  # so that every library is imported once, here
    for module in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[module]
    print(json.dumps({name: edited(*edit) for name, edit in edits.items()}))
