"""What `benchmarks.scale` runs on: prompts with golds, a model's files, and a policy of texts.

Sentences are made from seeded words, or taken from files. Every prompt, gold and answer recombines
them, so that a run of any size needs no model and no memory for its texts. An answer shares
sentences with its prompt's gold, and a refinement has sentences of its principle's own: scores,
the filter and the clustering have what they have in a real run. Principles are drawn from a few
thousand, with frequencies that fall as in language (Zipf), each worded in a hundred ways.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.random_model import CONTROL, TEMPLATE, random_llama
from models.policy import Completion, Messages, Progress, Request, Scoring

SENTENCES = 20_000
TOPIC = 200
"""Sentences of one topic: those that a prompt, its gold and its answers are made of."""
PRINCIPLES = 3_000
PROMPT_BYTES = 600
CRITIQUE = 1 / 6
"""Length of a critique, as a share of a refinement's."""
SPREAD = 0.5
"""Standard deviation of the logarithm of a text's length."""
LONGEST = 5.0
"""Times the mean length: the corpus refuses texts of more than 20,000 characters."""
VOCABULARY = 4096
KEPT = 0.8
"""Share of a first answer's sentences that its refinement keeps."""
CLOSER = 0.3
"""Share of the gold, at most, that a refinement adds."""


class World:
    """Texts that depend on nothing but the sentences, the seed and what they are asked for.

    Args:
        size: mean bytes of a refinement, and of a first answer and a gold.
    """

    def __init__(self, sentences: Sequence[str], seed: int, size: int) -> None:
        self.sentences, self.seed, self.size = tuple(sentences), seed, size
        self.mean = fmean(len(s.encode()) + 1 for s in self.sentences)
        found = Counter(re.findall(r"\b[a-z]{4,}\b", " ".join(self.sentences[:5_000])))
        self.words = [word for word, _ in found.most_common(600)]
        self.weights = list(accumulate(1 / (rank + 3) for rank in range(PRINCIPLES)))
        self.gold = lru_cache(64)(self._gold)

    def save(self, file: Path) -> None:
        """Keep it for other processes."""
        file.write_text(json.dumps([self.sentences, self.seed, self.size]), "utf-8")

    @classmethod
    def load(cls, file: Path) -> World:
        """What `save` kept."""
        return cls(*json.loads(file.read_text("utf-8")))

    def prompt(self, number: int) -> str:
        """A prompt that no other number has."""
        draw = random.Random(f"{self.seed}/prompt/{number}")
        asked = draw.choices(self.sentences, k=self._count(draw, PROMPT_BYTES))
        return " ".join([f"Request {number}.", *asked])

    def answer(self, prompt: str, key: str) -> str:
        """Up to 40 % of the prompt's gold, then other sentences."""
        draw = random.Random(f"{self.seed}/{key}")
        gold, count = self.gold(prompt), self._count(draw, self.size)
        kept = gold[: min(int(draw.uniform(0, 0.4) * len(gold)), count)]
        others = draw.choices(self._topic(prompt), k=max(count - len(kept), 1))
        return " ".join([*kept, *others])

    def critique(self, prompt: str, key: str) -> str:
        """A few sentences of the prompt's topic."""
        draw = random.Random(f"{self.seed}/{key}")
        count = self._count(draw, self.size * CRITIQUE)
        return " ".join(draw.choices(self._topic(prompt), k=count))

    def principle(self, key: str) -> str:
        """One of the principles, in one of its wordings."""
        draw = random.Random(f"{self.seed}/{key}")
        (rank,) = draw.choices(range(PRINCIPLES), cum_weights=self.weights)
        said = random.Random(f"{self.seed}/principle/{rank}").sample(self.words, 12)
        varied = [draw.choice(said[place : place + 3]) for place in (3, 6, 9)]
        start = draw.choice(("Always", "Please", "Do"))
        return f"{start} {said[0]} {said[1]} the {varied[0]} {said[2]} {varied[1]} {varied[2]}."

    def effect(self, principle: str) -> list[str]:
        """Two sentences that refinements under a principle insert, under any of its wordings."""
        named = " ".join(principle.split()[1:3])
        own = random.Random(f"{self.seed}/effect/{named}").sample(self.sentences, 6)
        return random.Random(principle).sample(own, 2)

    def refined(self, prompt: str, key: str, initial: str, principle: str) -> str:
        """Most of the first answer, some more of the gold, and what the principle inserts."""
        draw = random.Random(f"{self.seed}/{key}")
        gold = self.gold(prompt)
        kept = [said for said in _sentences(initial) if draw.random() < KEPT]
        closer = draw.choices(gold, k=round(draw.uniform(0, CLOSER) * len(gold)))
        return " ".join([*kept, *closer, *self.effect(principle)])

    def _gold(self, prompt: str) -> list[str]:
        draw = random.Random(f"{self.seed}/gold/{prompt}")
        return draw.choices(self._topic(prompt), k=self._count(draw, self.size))

    def _topic(self, prompt: str) -> Sequence[str]:
        start = zlib.crc32(prompt.encode()) % max(len(self.sentences) - TOPIC, 1)
        return self.sentences[start : start + TOPIC]

    def _count(self, draw: random.Random, size: float) -> int:
        """Sentences of a text: a log-normal length around the mean."""
        length = min(draw.lognormvariate(-(SPREAD**2) / 2, SPREAD), LONGEST)
        return max(1, round(size * length / self.mean))


def made_sentences(seed: int) -> list[str]:
    """Sentences of made words, whose frequencies fall as in language."""
    draw = random.Random(f"{seed}/sentences")
    words = list(dict.fromkeys(_word(draw) for _ in range(9_000)))
    weights = list(accumulate(1 / (rank + 3) for rank in range(len(words))))
    said = (
        draw.choices(words, cum_weights=weights, k=draw.randint(6, 24)) for _ in range(SENTENCES)
    )
    return [" ".join(sentence).capitalize() + "." for sentence in said]


def given_sentences(folder: Path) -> list[str]:
    """The first sentences of the texts in a folder's JSONL and CSV files.

    Raises:
        SystemExit: there are too few.
    """
    found: dict[str, None] = {}
    for text in _texts(folder):
        for sentence in re.split(r"(?<=[.!?])\s+|\n+", text):
            if 20 <= len(sentence) <= 300:
                found[sentence.strip()] = None
        if len(found) >= SENTENCES:
            break
    if len(found) < 2 * TOPIC:
        raise SystemExit(f"{folder}: {len(found)} sentences, expected {2 * TOPIC} at least")
    return list(found)[:SENTENCES]


def _texts(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*")):
        if file.suffix not in (".jsonl", ".csv"):
            continue
        with file.open(encoding="utf-8", newline="") as lines:
            rows = csv.DictReader(lines) if file.suffix == ".csv" else map(json.loads, lines)
            for row in rows:
                yield from _strings(row)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text)


def _word(draw: random.Random) -> str:
    return "".join(draw.choices("etaoinshrdlucmy", k=draw.randint(2, 9)))


def write_prompts(world: World, count: int, file: Path) -> None:
    """A JSONL file of prompts with their golds."""
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            prompt = world.prompt(number)
            row = {"prompt": prompt, "gold": " ".join(world.gold(prompt))}
            lines.write(json.dumps(row) + "\n")


def write_model(world: World, folder: Path) -> None:
    """A random Llama of one layer, and a byte-level BPE tokenizer that learned the world's words.

    Tokenising costs what it costs with a real model; a training step costs nearly nothing.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    random_llama(folder, vocabulary=VOCABULARY, hidden=64, layers=1)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=CONTROL, initial_alphabet=letters, show_progress=False
    )
    core.train_from_iterator(world.sentences[:5_000], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=CONTROL[0],
        eos_token=CONTROL[1],
        additional_special_tokens=CONTROL[2:],
        chat_template=TEMPLATE,
        model_max_length=8192,
    ).save_pretrained(folder)


class Recombined:
    """A `Policy` whose answers are recombined; `seconds` is what making them took, of processor."""

    seconds = 0.0

    def __init__(self, world: World) -> None:
        self.world = world

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        """See `Policy.generate`. A completion depends on its request's key and messages alone."""
        start = time.thread_time()
        made = [[self._one(r, f"{r.key}/{i}") for i in range(r.n)] for r in requests]
        Recombined.seconds += time.thread_time() - start
        if progress:
            progress(len(requests))
        return made

    def _one(self, request: Request, key: str) -> Completion:
        assert not isinstance(request.messages, str), "every turn of the method is a conversation"
        turns = [message["content"] for message in request.messages]
        match request.key.rpartition("/")[2]:
            case "principle":
                text = self.world.principle(key)
            case "critique":
                text = self.world.critique(turns[0], key)
            case "refined":  # x, y1, "why?", z
                text = self.world.refined(turns[0], key, turns[1], turns[3])
            case _:
                text = self.world.answer(turns[0], key)
        return Completion(text=text, tokens=len(text) // 4, logprob=math.nan, finish="stop")

    def logprobs(self, pairs: Sequence[tuple[Messages, str]]) -> list[Scoring]:
        """No stage of this benchmark asks for them."""
        raise AssertionError("a stage of this benchmark asks for log-probabilities")

    def hidden_states(self, texts: Sequence[str]) -> np.ndarray:
        """No stage of this benchmark asks for them."""
        raise AssertionError("a stage of this benchmark asks for hidden states")
