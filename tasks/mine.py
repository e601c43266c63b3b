"""E-step, proposals: y1, then N hinted principles, critiques and refinements of each prompt.

STaPLe, section 3, "principle discovery": z ~ p(· | x, y1, yG) sees the gold response, the
refinement y2 ~ p(· | x, y1, z[, c]) does not. Without principles (STaR) there are N refinements
y2 ~ p(· | x, y1). `score` reads the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from pydantic import Field

from models import prompts as ask
from models.policy import Completion, Messages, Policy, Progress, Request, finish_of
from models.prompts import Templates
from models.settings import Settings
from tasks.policies.opening import PolicySource
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.work import Metrics, Workspace
from tasks.rows import Candidate, Mined, Prompt, fields


class MineSettings(Settings):
    """How many candidates are proposed, and how they are sampled."""

    samples: int = Field(8, ge=1, le=256)
    """N: principles, each with its refinement, proposed for each prompt; refinements alone where
    the method has no principles."""
    critique: bool = True
    """Ask for a critique of the first response under the principle before refining it."""
    temperature: float = Field(0.8, ge=0, le=2)
    """Sampling temperature of all turns; on-policy is 1."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; 1 samples from the whole distribution."""
    max_response_tokens: int = Field(512, ge=1, le=16_384)
    """Longest first response and refinement."""
    max_principle_tokens: int = Field(64, ge=1, le=1024)
    """Longest principle."""
    max_critique_tokens: int = Field(256, ge=1, le=4096)
    """Longest critique."""


@stage("mine")
def mine_stage(at: Slot, settings: MineSettings, policy: PolicySource, prompts: Attempt) -> Attempt:
    """prompts → mined, shard by shard.

    Raises:
        UserError: the policy cannot be opened.
    """

    def compute(work: Workspace) -> Metrics:
        rows = prompts.rows("prompts", Prompt)
        job = partial(mine, settings, policy.templates, f"{at.seed}/{at.iteration}")
        with work.device(), policy.pool() as pool:
            parts = work.in_shards(
                "mined",
                Mined,
                rows,
                pool,
                job,
                what=f"mine {at.iteration}",
                unit="completions",
                each=completions_per_prompt(settings, policy.templates),
            )
        return _metrics(work.table(parts))

    inputs = policy.inputs(prompts=prompts)
    return policy.noted(at).attempt("mine", settings, inputs, compute, takes_device=True)


def mine(
    settings: MineSettings,
    templates: Templates,
    key: str,
    policy: Policy,
    rows: Sequence[Prompt],
    advance: Progress | None = None,
) -> list[Mined]:
    """y1 and N candidates (z, c, y2) for each prompt, in the order of the rows.

    Args:
        key: "<seed>/<iteration>"; with prompt_id, role and sample number it seeds the noise.
        advance: called with the number of completions that were sampled.
    """
    sample = _Sampler(policy, settings, key, advance)
    initials = sample.one("initial", [(r.prompt_id, r.prompt) for r in rows])
    propose = _guided if templates.guided else _unguided
    candidates = iter(propose(rows, [y1.text for y1 in initials], sample, templates))
    return [
        Mined(
            **fields(row),
            initial=y1.text,
            initial_finish=y1.finish,
            initial_tokens=y1.tokens,
            initial_thoughts=y1.thoughts,
            candidates=tuple(islice(candidates, settings.samples)),
        )
        for row, y1 in zip(rows, initials, strict=True)
    ]


def completions_per_prompt(settings: MineSettings, templates: Templates) -> int:
    """Completions for one prompt: y1, and N principles, critiques (if any) and refinements."""
    turns = (3 if settings.critique else 2) if templates.guided else 1
    return 1 + settings.samples * turns


@dataclass(frozen=True)
class _Draft:
    """A candidate in the making: a prompt, its y1 and its i-th principle."""

    row: Prompt
    initial: str
    sample: int
    principle: Completion

    @property
    def id(self) -> str:
        return f"{self.row.prompt_id}/{self.sample}"


NOTHING = Completion(text="", tokens=0, logprob=0.0, finish="stop")
"""What was not asked for: a critique, or a principle."""


class _Sampler:
    """Asks the policy in one role for many contexts, each named by its prompt (and sample)."""

    repeated = ("principle", "unguided")
    """Roles that are answered N times."""

    def __init__(
        self, policy: Policy, settings: MineSettings, key: str, advance: Progress | None
    ) -> None:
        self.policy, self.settings, self.key, self.advance = policy, settings, key, advance
        self.limits = {
            "initial": settings.max_response_tokens,
            "principle": settings.max_principle_tokens,
            "critique": settings.max_critique_tokens,
            "refined": settings.max_response_tokens,
            "unguided": settings.max_response_tokens,
        }

    def __call__(
        self, role: str, contexts: Sequence[tuple[str, Messages]]
    ) -> list[list[Completion]]:
        requests = [
            Request(
                messages=messages,
                key=f"{self.key}/{name}/{role}",
                n=self.settings.samples if role in self.repeated else 1,
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                max_tokens=self.limits[role],
            )
            for name, messages in contexts
        ]
        return self.policy.generate(requests, self.advance)

    def one(self, role: str, contexts: Sequence[tuple[str, Messages]]) -> list[Completion]:
        return [completions[0] for completions in self(role, contexts)]


def _guided(
    rows: Sequence[Prompt], initials: Sequence[str], sample: _Sampler, templates: Templates
) -> list[Candidate]:
    """N candidates (z, c, y2) of every row, row by row; z is hinted by the gold."""
    hints = [
        (r.prompt_id, ask.ask_with_gold(templates, r.prompt, y1, r.gold))
        for r, y1 in zip(rows, initials, strict=True)
    ]
    drafts = [
        _Draft(row, y1, i, z)
        for row, y1, zs in zip(rows, initials, sample("principle", hints), strict=True)
        for i, z in enumerate(zs)
    ]
    critiques = _critiques(drafts, sample, templates)
    contexts = [
        (d.id, ask.ask_refinement(templates, d.row.prompt, d.initial, d.principle.text, c.text))
        for d, c in zip(drafts, critiques, strict=True)
    ]
    refined = sample.one("refined", contexts)
    return list(map(_candidate, drafts, critiques, refined))


def _unguided(
    rows: Sequence[Prompt], initials: Sequence[str], sample: _Sampler, templates: Templates
) -> list[Candidate]:
    """N candidates y2 of every row, row by row, asked without a principle and without the gold."""
    contexts = [
        (r.prompt_id, ask.ask_refinement(templates, r.prompt, y1))
        for r, y1 in zip(rows, initials, strict=True)
    ]
    return [
        _candidate(_Draft(row, y1, i, NOTHING), NOTHING, y2)
        for row, y1, refined in zip(rows, initials, sample("unguided", contexts), strict=True)
        for i, y2 in enumerate(refined)
    ]


def _critiques(
    drafts: Sequence[_Draft], sample: _Sampler, templates: Templates
) -> list[Completion]:
    if not sample.settings.critique:
        return [NOTHING] * len(drafts)
    contexts = [
        (d.id, ask.ask_critique(templates, d.row.prompt, d.initial, d.principle.text))
        for d in drafts
    ]
    return sample.one("critique", contexts)


def _candidate(draft: _Draft, critique: Completion, refined: Completion) -> Candidate:
    parts = (draft.principle, critique, refined)
    return Candidate(
        sample=draft.sample,
        principle=draft.principle.text,
        critique=critique.text,
        refined=refined.text,
        finish=finish_of(parts),
        tokens=sum(part.tokens for part in parts),
        principle_thoughts=draft.principle.thoughts,
        critique_thoughts=critique.thoughts,
        refined_thoughts=refined.thoughts,
    )


def _metrics(mined: Iterable[Mined]) -> Metrics:
    """Figures of all rows, each of which is read once."""
    total = Counter[str]()
    for row in mined:
        total["prompts"] += 1
        total["candidates"] += len(row.candidates)
        total["tokens"] += row.initial_tokens + sum(c.tokens for c in row.candidates)
        total["cut"] += sum(c.finish != "stop" for c in row.candidates)
    return {
        "mined_prompts": total["prompts"],
        "mined_candidates": total["candidates"],
        "generated_tokens": total["tokens"],
        "truncated_share": total["cut"] / total["candidates"] if total["candidates"] else 0.0,
    }
