"""Figures that need the truth of an embedded world: were the right principles found, and followed?

`tasks.evaluate` computes them where the world has an oracle. Nothing learns from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

from models.policy import Message
from models.worlds.base import Oracle, World
from models.worlds.registry import WORLDS
from tasks.rows import Answer, Labelled, Mined, Prompt, Response

LEAST_EFFECT = 0.25
"""Least rise of the share of responses that show a behaviour, for a principle to do it."""


def world_of(prompts: Sequence[Prompt]) -> World | None:
    """The embedded world that all of these prompts come from; None where there is none."""
    names = {p.source.partition("/")[0] for p in prompts}
    return WORLDS.get(names.pop()) if len(names) == 1 else None


def behaviour_by_effect(oracle: Oracle, pairs: Sequence[tuple[str, str]]) -> str | None:
    """The behaviour that a principle means by what it does: y2 shows it more often than y1 in
    (y1, y2) pairs under the principle, by `LEAST_EFFECT` of them at least; None where no behaviour
    does, or several as often."""
    rises = Counter[str]()
    for initial, refined in pairs:
        rises.update(oracle.shown(refined))
        rises.subtract(oracle.shown(initial))
    most = max(rises.values(), default=0)
    found = [behaviour for behaviour, rise in rises.items() if rise == most]
    return found[0] if most and most >= LEAST_EFFECT * len(pairs) and len(found) == 1 else None


def faithfulness_metrics(
    oracle: Oracle, *, labelled: Sequence[Labelled], answers: Sequence[Answer]
) -> dict[str, float]:
    """Does a refinement do what its principle asks? Shares in [0, 1].

    For the kept trajectories under their own principle ("original") and under the label that is
    trained on ("label"); and for the answers to held-out prompts under the principle that the
    policy gave itself, where it gave one ("answers"). A principle that names no behaviour cannot be
    followed.
    """
    claims = {
        "original": [(row.principle, row.refined) for row in labelled],
        "label": [(row.label, row.refined) for row in labelled],
        "answers": [(row.principle, row.refined) for row in answers if row.principle],
    }
    return {
        f"faithfulness/{name}": fmean(oracle.behaviour_of(z) in oracle.shown(y) for z, y in pairs)
        for name, pairs in claims.items()
        if pairs
    }


def truth_metrics(
    world: str,
    oracle: Oracle,
    *,
    mined: Iterable[Mined],
    labelled: Sequence[Labelled],
    principles: Sequence[str],
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
) -> dict[str, float]:
    """Figures under the world's name; shares in [0, 1].

    - `nmi`, `ari`: the clusters against the behaviour that each distinct kept
      principle names (malformed ones left out and counted).
    - `precision`: entries of the constitution (`principles`) that name a behaviour which
      prompts call for; `recall`: such behaviours that at least one entry names;
      `duplicates`: entries that name a behaviour which another entry already names.
    - `precision_by_effect`, `recall_by_effect`, `duplicates_by_effect`: the same, where an entry
      means what the kept trajectories under it do (`behaviour_by_effect`).
    - `planted/hinted_right`, `kept_right`, `invented_right`: principles that the prompt calls for
      and y1 lacks, among all sampled candidates, the kept trajectories and the held-out answers.
    - `core_initial`, `core_refined`: how much of the content survives.
    """

    def right(prompt: Sequence[Message], initial: str, principle: str) -> bool:
        named = oracle.behaviour_of(principle)
        return named in oracle.needed(prompt[-1]["content"]) - oracle.shown(initial)

    asked = {p.prompt_id: p.prompt for p in prompts}
    shares: dict[str, Sequence[float]] = {
        "hinted_right": [
            right(r.prompt, r.initial, c.principle) for r in mined for c in r.candidates
        ],
        "kept_right": [right(r.prompt, r.initial, r.principle) for r in labelled],
        "invented_right": [right(asked[a.prompt_id], a.initial, a.principle) for a in answers],
        "core_initial": [
            oracle.core_share(asked[a.prompt_id][-1]["content"], a.initial) for a in answers
        ],
        "core_refined": [
            oracle.core_share(asked[a.prompt_id][-1]["content"], a.refined) for a in answers
        ],
    }
    truth = oracle.called([turns[-1]["content"] for turns in asked.values()])
    done = [
        behaviour_by_effect(oracle, [(r.initial, r.refined) for r in labelled if r.label == z])
        for z in principles
    ]
    figures = (
        {name: fmean(values) for name, values in shares.items() if values}
        | _recovery(map(oracle.behaviour_of, principles), truth)
        | {f"{name}_by_effect": value for name, value in _recovery(done, truth).items()}
        | _agreement(labelled, oracle)
    )
    return {f"{world}/{name}": value for name, value in figures.items()}


def obedience_metrics(
    world: str, oracle: Oracle, responses: Iterable[Response], prompts: Iterable[Prompt]
) -> dict[str, float]:
    """Of SAMI's responses under the world's name, by the kind of constitution; shares in [0, 1].

    - `obeyed_<arm>`: of the principles and antitheses in the response's constitution that name a
      behaviour, those that the response follows.
    - `core_<arm>`: how much of the content survives; the arm "plain" has no constitution.
    """
    asked = {p.prompt_id: p.prompt[-1]["content"] for p in prompts}
    shares: dict[str, list[float]] = {}
    for row in responses:
        core = oracle.core_share(asked[row.prompt_id], row.response)
        shares.setdefault(f"core_{row.arm}", []).append(core)
        if (obeyed := oracle.obeyed(row.principles, row.response)) is not None:
            shares.setdefault(f"obeyed_{row.arm}", []).append(obeyed)
    return {f"{world}/{name}": fmean(values) for name, values in shares.items()}


def _recovery(meant: Iterable[str | None], truth: frozenset[str]) -> dict[str, float]:
    """Precision, recall and duplicates of a constitution, of whose entries each means one behaviour
    or none, against what prompts call for."""
    entries = list(meant)
    right = [behaviour for behaviour in entries if behaviour in truth]
    figures = {"recall": len(set(right)) / len(truth)}
    if entries:
        figures["precision"] = len(right) / len(entries)
        figures["duplicates"] = float(len(right) - len(set(right)))
    return figures


def _agreement(labelled: Sequence[Labelled], oracle: Oracle) -> dict[str, float]:
    """NMI and ARI of the clusters of distinct principles against what they name."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    clusters = {row.principle: row.cluster for row in labelled}
    named = {z: b for z in clusters if (b := oracle.behaviour_of(z)) is not None}
    figures = {"malformed": float(len(clusters) - len(named))}
    if len(named) > 1:
        truth, found = list(named.values()), [clusters[z] for z in named]
        figures["nmi"] = float(normalized_mutual_info_score(truth, found))
        figures["ari"] = float(adjusted_rand_score(truth, found))
    return figures
