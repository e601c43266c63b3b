"""What a real model keeps of its other abilities: plain text's perplexity, and IFEval.

    python -m benchmarks.house_style_kept --text tldr.csv --ifeval input_data.jsonl --seeds 100 101

After `benchmarks.house_style_loop`, with the same folder and settings: the model as it comes, what
it was taught, and each seed's last iteration. Perplexity is of the posts in a column of a CSV file,
each cut at 256 tokens; IFEval is of first answers to every fifth prompt, the first hundred of them.
Prints a table with 95 % intervals over posts, or prompts.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.house_style import bootstrap
from benchmarks.house_style_loop import loop_options
from benchmarks.planted_runs import enter, iterated, table
from models.policy import Policy, Request, user
from tasks.benchmarks.ifeval.data import InstructedPrompt, ifeval_metrics, read_examples, verdicts

LONGEST = 256
"""Most tokens of a post, and of an answer."""


def token_losses(policy: Any, texts: Sequence[str]) -> list[tuple[float, int]]:
    """Of each text: the sum of −log p over its tokens but the first, in nats, and their number."""
    found = []
    for text in texts:
        ids = policy.tokenizer(text, return_tensors="pt").input_ids[:, :LONGEST]
        with torch.no_grad():
            loss = policy.model(input_ids=ids, labels=ids).loss
        found.append((float(loss) * (ids.shape[1] - 1), ids.shape[1] - 1))
    return found


def perplexity(losses: Sequence[tuple[float, int]]) -> str:
    """exp of the mean loss a token, with its interval over texts."""
    whole = math.exp(sum(loss for loss, _ in losses) / sum(n for _, n in losses))
    low, high = bootstrap([loss / n for loss, n in losses])
    return f"{whole:.2f} [{math.exp(low):.2f}, {math.exp(high):.2f}]"


def instructed(policy: Policy, examples: Sequence[InstructedPrompt]) -> str:
    """The share of IFEval's prompts whose first answer does all that is asked, strictly."""
    requests = [
        Request(
            messages=(user(e.prompt),), key=f"ifeval/{e.key}", temperature=0.5, max_tokens=LONGEST
        )
        for e in examples
    ]
    said = [completion.text for (completion,) in policy.generate(requests)]
    responses = {e.key: text for e, text in zip(examples, said, strict=True)}
    figures = ifeval_metrics(verdicts(examples, responses), seed=0, resamples=1000)
    name = "ifeval/prompt_strict"
    return f"{figures[name]:.2f} [{figures[name + '_low']:.2f}, {figures[name + '_high']:.2f}]"


def policies(
    folder: Path, seeds: Sequence[int], changes: Sequence[str]
) -> Iterator[tuple[str, Policy]]:
    """The model as it comes, what it was taught, and each seed's last iteration."""

    for number, seed in enumerate(seeds):
        enter(folder / f"seed-{seed}")
        e, _ = iterated("house-style", [f"seed={seed}", *changes])
        if number == 0:
            yield "as it comes", e.untaught.load()
            yield "taught", e.policy(0).load()
        yield f"seed {seed}, iteration {e.settings.last}", e.policy(e.settings.last).load()


def main() -> None:
    """Measure every policy, and print the table."""
    options = loop_options(__doc__)
    options.add_argument("--text", type=Path, required=True, help="a CSV file")
    options.add_argument("--column", default="query")
    options.add_argument("--ifeval", type=Path, required=True, help="IFEval's input_data.jsonl")
    chosen = options.parse_args()
    with chosen.text.open(encoding="utf-8", newline="") as file:
        texts = [row[chosen.column] for row in csv.DictReader(file)][:100]
    examples = read_examples(str(chosen.ifeval.absolute()))[::5][:100]
    rows = []
    for name, policy in policies(chosen.folder.absolute(), chosen.seeds, chosen.set):
        losses = token_losses(policy, texts)
        rows.append([name, perplexity(losses), instructed(policy, examples)])
        print(rows[-1], flush=True)
    headings = ["policy", f"perplexity of {len(texts)} posts", "IFEval, strict prompts"]
    print("\n".join(table(headings, rows)))


if __name__ == "__main__":
    main()
