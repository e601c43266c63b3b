"""Pretrains the planted world's seed models: small Llamas with their tokenizer, from scratch.

A model answers plainly, names principles and refines by them, each with a limited skill that the
noise of its last conversations sets; those for SAMI also half follow a constitution, and write
principles and antitheses. `planted_model` is what presets and tests call.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from models.engine.threads import pinned
from models.files import Damaged, file_sha256, read_sealed, remove, write_sealed
from models.notices import say
from models.planted import world
from models.prompts import TERSE, TERSE_CONSTITUTION, ask_antithesis, under_constitution

PAD, UNKNOWN, SYSTEM, USER, ASSISTANT, END = (
    "<pad>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


SEAL = "sealed.json"
"""The digests of a made model's files, beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    """How good the conversations of a phase are; shares in [0, 1]. A model comes to imitate it."""

    names: float
    """A principle named in sight of the gold is one that the gold shows and y1 lacks."""
    follows: float
    """A refinement shows the behaviour of its principle."""
    prior: float
    """A principle named without gold is one that the prompt's cues bring to mind."""
    obeys: float = 1.0
    """A response shows the behaviour of a principle in its constitution."""
    slips: float = 0.0
    """A response shows the behaviour whose antithesis is in its constitution."""
    opposes: float = 1.0
    """An antithesis is that of its principle; else it is the principle again, or another's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The seed model's size, its training and the skill that it is left with."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    intermediate: int = 384
    words: int = 6_000
    """Conversations of cue words alone, without a chore: what goes with which principle."""
    clean: int = 13_000
    """Whole conversations of the able skill."""
    noisy: int = 7_000
    """Whole conversations of the final skill: they leave the rest latent, for EM to amplify."""
    able: Skill = Skill(names=1.0, follows=1.0, prior=0.8)
    final: Skill = Skill(names=0.5, follows=0.6, prior=0.3, obeys=0.6, slips=0.3, opposes=0.85)
    mistaken: float = 0.3
    """How often a cue brings the wrong behaviour of its two to mind."""
    platitudes: float = 0.5
    """How often a principle that is named for want of a better one is a platitude."""
    strays: float = 0.3
    """How often a refinement that does not follow shows a random behaviour; else it shows none."""
    critiques: float = 0.0
    """How often a critique, of where the answer lacks its principle, comes before a refinement."""
    already: float = 0.25
    """How often the answer to be refined shows a behaviour already."""
    constitutions: float = 0.0
    """How often a conversation is a response under a constitution (`SAMI`)."""
    writes: float = 0.0
    """How often it is a principle that is asked for, and its antithesis."""
    rows: int = 56
    """Conversations a batch."""
    matrix_lr: float = 0.02
    """Peak learning rate of Muon, for the matrices inside the layers."""
    lr: float = 4e-3
    """Peak learning rate of AdamW, for embeddings and norms."""
    decisive: float = 3.0
    """Loss weight of a principle and of what a refinement adds; 1 for what is copied."""
    threads: int = 1
    """On a quiet machine two are a quarter faster, on a busy one several times slower; a fixed
    number keeps the model the same everywhere."""

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return math.ceil((self.words + self.clean + self.noisy) / self.rows)


RECIPES = {
    "planted": Recipe(),
    "planted-misled": Recipe(mistaken=0.6),
    "planted-sami": Recipe(constitutions=0.4, writes=0.08, clean=26_000, noisy=4_000),
    "planted-sami-small": Recipe(
        constitutions=0.4, writes=0.08, clean=26_000, noisy=4_000,
        hidden=64, layers=2, heads=2, intermediate=192,
    ),
}  # fmt: skip
"""The planted models by the name that `policy.model` has. "planted-misled" believes the wrong
behaviour of a cue's two more often than the right one. Those for SAMI know all that "planted"
knows; the small one is the weak writer of principles."""

CRITIQUES = {True: "before.", False: "after."}
"""What a critique says of a behaviour that opens an answer, and of one that closes it."""


@dataclass(frozen=True, slots=True)
class TrainedTurn:
    """One chat turn; `weight` is the loss weight of its tokens, 0 for context."""

    role: str
    text: str
    weight: float = 0.0
    known: frozenset[str] = frozenset()
    """Words of a trained turn that count 1 at most: they are copied from the turns before."""

    def weight_of(self, word: str) -> float:
        """Loss weight of one word of this turn."""
        return min(self.weight, 1.0) if word in self.known else self.weight


def planted_model(
    cache: Path,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    recipe: Recipe | None = None,
) -> Path:
    """The directory of the seed model, pretrained the first time it is asked for.

    Args:
        cache: the folder that holds one model per fingerprint of (the sources, recipe, seed,
            torch version).
        seed: of the weights and the pretraining data.
        progress: called with (steps done, steps in all).
        recipe: that of "planted", unless given.
    """
    recipe = recipe or Recipe()
    target = cache / f"planted-{fingerprint(recipe, seed)}"
    if target.is_dir():
        if _is_sealed(target):
            return target
        say(f"{target} was damaged; the model is made again")
        remove(target)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".planted-") as scratch:
        directory = Path(scratch) / "model"
        pretrain(recipe, seed, directory, progress)
        write_sealed(directory / SEAL, _digests(directory))
        _publish(directory, target)
    return target


def _is_sealed(directory: Path) -> bool:
    """Whether a made model is as it was made."""
    try:
        return bool(read_sealed(directory / SEAL) == _digests(directory))
    except (Damaged, OSError):
        return False


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(p for p in directory.iterdir() if p.name != SEAL)
    return {file.name: file_sha256(file) for file in files}


def fingerprint(recipe: Recipe, seed: int) -> str:
    """16 hex digits that change with the world's and this file's source, recipe, seed or torch."""
    sources = [Path(path).read_text("utf-8") for path in (world.__file__, __file__)]
    version = ".".join(torch.__version__.split(".")[:2])
    wording = [asdict(TERSE), asdict(TERSE_CONSTITUTION)]
    parts = json.dumps([sources, asdict(recipe), wording, seed, version], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def pretrain(
    recipe: Recipe,
    seed: int,
    directory: Path,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train a seed model and save it with its tokenizer as a transformers directory.

    The same arguments give the same weights on the same machine and torch version. About 75 s on
    one core with bf16 matrix instructions; 0.9 GB at most.
    """
    disable_progress_bar()
    tokenizer = build_tokenizer(TERSE_CONSTITUTION.said if recipe.constitutions else "")
    model = build_model(recipe, tokenizer, seed)
    with pinned(recipe.threads):
        _train(model, _batches(recipe, seed, tokenizer), recipe, progress)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def build_tokenizer(more: str = "") -> PreTrainedTokenizerFast:
    """Words and punctuation marks; decoding what it encoded gives the same text.

    Args:
        more: a text with further words.
    """
    specials = [PAD, UNKNOWN, SYSTEM, USER, ASSISTANT, END]
    turns = " ".join([*TERSE.texts, more]).replace("{gold}", "")
    texts = sorted({*world.vocabulary(), *world.words(turns)})
    names = [word if not word.isalpha() else f"▁{word}" for word in texts]
    vocabulary = {name: i for i, name in enumerate(specials + names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[^\w▁]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def conversations(recipe: Recipe, seed: int) -> Iterator[list[TrainedTurn]]:
    """The curriculum: cue words alone, then whole and able, then whole and noisy conversations."""
    rng = random.Random(f"pretrain/{seed}")
    phases = (
        (recipe.words, recipe.able, False),
        (recipe.clean, recipe.able, True),
        (recipe.noisy, recipe.final, True),
    )
    for n, skill, whole in phases:
        for _ in range(n):
            if whole and recipe.writes and rng.random() < recipe.writes:
                yield _written(rng, recipe, skill)
            elif whole and recipe.constitutions and rng.random() < recipe.constitutions:
                yield _under_constitution(rng, recipe, skill)
            else:
                yield _Conversation(rng, recipe, skill, whole).turns()


def _under_constitution(rng: random.Random, recipe: Recipe, skill: Skill) -> list[TrainedTurn]:
    """A prompt under one to four principles and antitheses; the response half follows them."""
    example = world.sample_example(rng, "train", "any")
    named = rng.sample(list(world.BEHAVIOURS), rng.choice((1, 2, 3, 4)))
    asked = [rng.random() < 0.5 for _ in named]
    texts = [world.principle(rng, behaviour) for behaviour in named]
    shown = [
        behaviour
        for behaviour, wanted in zip(named, asked, strict=True)
        if rng.random() < (skill.obeys if wanted else skill.slips)
    ]
    system, *prompt = under_constitution(
        TERSE_CONSTITUTION,
        [t if w else world.antithesis(t) for t, w in zip(texts, asked, strict=True)],
        ({"role": "user", "content": example.prompt},),
    )
    known = frozenset(world.words(example.chore.core))
    answer = world.realise(rng, example.chore.core, shown)
    return [
        TrainedTurn("system", system["content"]),
        TrainedTurn("user", prompt[0]["content"]),
        TrainedTurn("assistant", answer, recipe.decisive, known),
    ]


def _written(rng: random.Random, recipe: Recipe, skill: Skill) -> list[TrainedTurn]:
    """A principle on a topic, and its antithesis."""
    topic, behaviour = rng.choice(world.OBJECTS), rng.choice(list(world.BEHAVIOURS))
    text = rng.choice(world.BEHAVIOURS[behaviour].wordings).format(topic)
    opposite = world.antithesis(text)
    if rng.random() >= skill.opposes:
        other = world.antithesis(world.principle(rng, rng.choice(list(world.BEHAVIOURS))))
        opposite = rng.choice((text, other))
    ask, name, oppose = ask_antithesis(TERSE_CONSTITUTION, topic, text)
    return [
        TrainedTurn("user", ask["content"]),
        TrainedTurn("assistant", name["content"], recipe.decisive),
        TrainedTurn("user", oppose["content"]),
        TrainedTurn("assistant", opposite, recipe.decisive),
    ]


class _Conversation:
    """One conversation in the turns of `models.prompts`, on a training prompt of the world.

    The behaviours of drafts and golds are drawn evenly, whatever the prompt: only `Skill.prior`
    ties behaviours to prompts, and the same in refinements with and without a principle.
    """

    def __init__(self, rng: random.Random, recipe: Recipe, skill: Skill, whole: bool) -> None:
        self.rng, self.recipe, self.skill = rng, recipe, skill
        example = world.sample_example(rng, "train", "any")
        cues = " ".join(rng.sample(example.cues, len(example.cues)))
        self.prompt, self.core = (example.prompt, example.chore.core) if whole else (cues, "")
        shown = [rng.choice(list(world.BEHAVIOURS))] if rng.random() < recipe.already else []
        self.forms = {b: rng.choice(world.BEHAVIOURS[b].forms) for b in shown}
        self.absent = [b for b in world.BEHAVIOURS if b not in shown]
        self.needed = sorted(example.needed)

    def turns(self) -> list[TrainedTurn]:
        """40 % name a principle in sight of a gold, 40 % name and refine, 20 % refine unguided."""
        initial = world.arrange(self.core, self.forms)
        plain = bool(self.core) and not self.forms
        start = [TrainedTurn("user", self.prompt), TrainedTurn("assistant", initial, float(plain))]
        kind = self.rng.random()
        if kind < 0.4:
            return start + self._name_with_gold()
        named = self._named()
        if kind < 0.8:
            start += [TrainedTurn("user", TERSE.propose), self._principle(named)]
            if self.recipe.critiques and self.rng.random() < self.recipe.critiques:
                start += [TrainedTurn("user", TERSE.critique), self._critique(named)]
        return [*start, TrainedTurn("user", TERSE.refine), self._refined(initial, named)]

    def _name_with_gold(self) -> list[TrainedTurn]:
        missing = self.rng.sample(self.absent, self.rng.choice((1, 2, 3)))
        gold = world.realise(self.rng, self.core, missing)
        right = self.rng.random() < self.skill.names
        named = self.rng.choice(missing) if right else self._anything()
        return [TrainedTurn("user", TERSE.hint.format(gold=gold)), self._principle(named)]

    def _named(self) -> str | None:
        """A behaviour named without gold, right or mistaken, or None: a platitude."""
        if self.rng.random() < self.skill.prior:
            called = self.rng.choice(self.needed)
            named = world.MISTAKEN[called] if self.rng.random() < self.recipe.mistaken else called
            if named in self.absent:
                return named
        return self._anything()

    def _anything(self) -> str | None:
        empty = self.rng.random() < self.recipe.platitudes
        return None if empty else self.rng.choice(self.absent)

    def _principle(self, behaviour: str | None) -> TrainedTurn:
        text = world.principle(self.rng, behaviour) if behaviour else world.platitude(self.rng)
        return TrainedTurn("assistant", text, self.recipe.decisive)

    def _critique(self, named: str | None) -> TrainedTurn:
        """Where the behaviour belongs: before the core, after it, or nowhere."""
        place = "elsewhere." if named is None else CRITIQUES[world.BEHAVIOURS[named].opens]
        return TrainedTurn("assistant", place, self.recipe.decisive)

    def _refined(self, initial: str, named: str | None) -> TrainedTurn:
        added: str | None = None
        if self.rng.random() < self.skill.follows:
            added = named
        elif self.rng.random() < self.recipe.strays:
            added = self.rng.choice(self.absent)
        extra = {added: self.rng.choice(world.BEHAVIOURS[added].forms)} if added else {}
        text = world.arrange(self.core, self.forms | extra)
        return TrainedTurn("assistant", text, self.recipe.decisive, frozenset(world.words(initial)))


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # on short rows twice as fast as the fused kernel
    return model


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded token ids and the loss weights of the tokens, both (rows, length)."""

    ids: torch.Tensor
    weights: torch.Tensor


Row = tuple[list[int], list[float]]


def _batches(recipe: Recipe, seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    """The curriculum in batches of conversations of like length, made as they are needed."""
    rng = random.Random(f"batches/{seed}")
    encode = RowEncoder(tokenizer)
    turns = conversations(recipe, seed)
    while chunk := [encode(t) for t in itertools.islice(turns, 32 * recipe.rows)]:
        chunk.sort(key=lambda row: len(row[0]) + 4 * rng.random())
        batches = [chunk[i : i + recipe.rows] for i in range(0, len(chunk), recipe.rows)]
        rng.shuffle(batches)
        yield from map(_pad, batches)


class RowEncoder:
    """Chat turns → token ids and loss weights, as the tokenizer and its chat template would."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.ids = {token.removeprefix("▁"): i for token, i in tokenizer.get_vocab().items()}

    def __call__(self, turns: Sequence[TrainedTurn]) -> Row:
        ids: list[int] = []
        weights: list[float] = []
        for turn in turns:
            words = world.words(turn.text)
            ids += [self.ids[f"<|{turn.role}|>"], *(self.ids[word] for word in words)]
            weights += [0.0, *(turn.weight_of(word) for word in words)]
            if turn.role == "assistant":
                ids.append(self.ids[END])
                weights.append(turn.weight)
        return ids, weights


def _pad(rows: list[Row]) -> Batch:
    length = 8 * math.ceil(max(len(ids) for ids, _ in rows) / 8)  # few shapes: each costs memory
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for k, (row, weight) in enumerate(rows):
        ids[k, : len(row)] = torch.tensor(row)
        weights[k, : len(row)] = torch.tensor(weight)
    return Batch(ids, weights)


def _train(
    model: LlamaForCausalLM,
    batches: Iterator[Batch],
    recipe: Recipe,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Muon for the matrices, AdamW for the rest; fp32 weights, and matrix products in bf16 where
    the processor has units for them: elsewhere they are emulated, ten times slower than fp32."""
    groups, quick = _split_parameters(model), _bf16_is_quick()
    kind = torch.optim.Muon if quick else _Float32Muon
    muon = kind(groups[0], lr=recipe.matrix_lr, weight_decay=0.01, momentum=0.95)
    adam = torch.optim.AdamW(groups[1], lr=recipe.lr, weight_decay=0.0, betas=(0.9, 0.95))
    optimisers = ((muon, recipe.matrix_lr), (adam, recipe.lr))
    for step, batch in enumerate(batches):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=quick):
            loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(groups[1], 1.0)
        for optimiser, lr in optimisers:
            optimiser.param_groups[0]["lr"] = lr * _schedule(step, recipe.steps)
            optimiser.step()
            optimiser.zero_grad()
        if progress:
            progress(step + 1, recipe.steps)


def _bf16_is_quick() -> bool:
    return str(torch.backends.cpu.get_cpu_capability()).startswith("AVX512")


class _Float32Muon(torch.optim.Muon):
    """torch's Muon, whose orthogonalisation is in bf16 whatever the processor, in fp32."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, as torch's."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state, gradient = self.state[parameter], parameter.grad
                if "average" not in state:
                    state["average"] = torch.zeros_like(parameter)
                average = state["average"].lerp_(gradient, 1 - group["momentum"])
                update = _orthogonal(gradient.lerp(average, group["momentum"]), group)
                scale = math.sqrt(max(1, parameter.shape[0] / parameter.shape[1]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)


def _orthogonal(update: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Newton and Schulz' iteration towards the nearest orthogonal matrix."""
    a, b, c = group["ns_coefficients"]
    tall = update.shape[0] > update.shape[1]
    found = update.T if tall else update
    found = found / found.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = found @ found.T
        found = a * found + (b * gram + c * gram @ gram) @ found
    return found.T if tall else found


def _split_parameters(
    model: LlamaForCausalLM,
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The matrices inside the layers, and everything else."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]


def _schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: 20 steps of warm-up, flat, down over the last 60 %."""
    left = (steps - step) / steps / 0.6
    return min(1.0, (step + 1) / 20) * max(0.03, min(1.0, left))


def _loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Weighted cross-entropy over the trained tokens."""
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    weights = batch.weights[:, 1:]
    trained = weights > 0
    losses = torch.nn.functional.cross_entropy(
        logits[trained].float(), batch.ids[:, 1:][trained], reduction="none"
    )
    return (losses * weights[trained]).sum() / weights.sum()


def _publish(directory: Path, target: Path) -> None:
    """Rename into place; when another process was faster, its model stands."""
    try:
        os.replace(directory, target)
    except OSError:
        if not target.is_dir():
            raise
