"""AlpacaEval 2: its files, its win rate and its length-controlled win rate.

Read by `evaluate` and the report. The figures are those of the public leaderboard, in per cent,
without the `alpaca-eval` package: win rate, standard error and counts as it computes them, and the
length-controlled rate of Dubois et al. (2024, arXiv 2404.04475) from a fit or published weights.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

from constitutions.errors import UserError
from tasks.benchmarks.rows import Source, ValidText, read_records, read_rows
from tasks.corpus.rows import Record
from tasks.judging.length_control import standardised

# Files


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, populate_by_name=True)


class Output(_Row):
    """A row of `model_outputs.json`: what one model answers to one instruction."""

    instruction: ValidText
    output: ValidText
    """May be empty: a model may have nothing to say."""
    generator: str = Field(pattern=r"\S")
    """The model's name."""
    dataset: Annotated[str, BeforeValidator(lambda value: value or "")] = ""


class Annotation(_Row):
    """A row of `annotations.json`: the baseline's answer (1) against the model's (2)."""

    instruction: str
    output_1: str
    generator_1: str
    output_2: str
    generator_2: str
    annotator: str
    preference: float | None
    """1 + P(the model's answer is better), in [1, 2]; 0 is an old way to write a draw, 1.5.
    None is a failed judgement."""
    dataset: str = ""

    @property
    def outcome(self) -> float | None:
        """The model's outcome in [0, 1], as `tasks.judging.winrate` reads it."""
        if self.preference is None:
            return None
        return (self.preference or 1.5) - 1

    @property
    def delta_length(self) -> int:
        """How many characters longer the baseline's answer is."""
        return len(self.output_1) - len(self.output_2)


def read_outputs(path: Source) -> list[Output]:
    """The answers of one model, as `model_outputs.json` has them; other fields are dropped.

    Raises:
        UserErrors: rows that cannot be read, each with its field.
        UserError: the file cannot be read, or mixes the answers of several models.
    """
    rows = read_rows(path, Output, lambda row: row.instruction)
    for number, row in enumerate(rows, start=1):
        if row.generator != rows[0].generator:
            raise UserError(
                f"this row is an answer of {row.generator!r}, row 1 one of {rows[0].generator!r}",
                where=f"{path}, row {number}, field 'generator'",
                expected="the answers of one model",
            )
    return rows


def write(path: Path, rows: Sequence[Output | Annotation]) -> None:
    """Write answers or judged pairs as AlpacaEval reads them; a failed judgement is null.

    In ASCII, as AlpacaEval itself writes: every locale reads it alike.
    """
    plain = [row.model_dump(exclude={"dataset"} if not row.dataset else None) for row in rows]
    path.write_text(json.dumps(plain, indent=1, allow_nan=False), encoding="ascii")


# The win rate


def standard_error(annotations: Sequence[Annotation]) -> float | None:
    """The leaderboard's standard error of the win rate, from the sample variance, in per cent.

    None where fewer than two rows have a preference.
    """
    outcomes = [a.outcome for a in annotations]
    return _standard_error(np.array([outcome for outcome in outcomes if outcome is not None]))


def _standard_error(shares: np.ndarray) -> float | None:
    """Per cent; None where the sample variance is undefined."""
    n = len(shares)
    return 100 * float(shares.std(ddof=1)) / math.sqrt(n) if n > 1 else None


# The length-controlled win rate

CANDIDATES = np.logspace(-4, 4, 10)
"""Inverse strengths C of the L1 penalty that cross-validation chooses from."""
FOLDS = 5
GAMED_WEIGHT = 0.2
"""What all gamed baselines together weigh, where one judged instruction weighs 1."""


class Weights(NamedTuple):
    """The GLM's coefficients for one model.

    logit P(the model wins) = length · tanh(Δlen / std Δlen) + difficulty · d + bias.
    """

    length: float
    difficulty: float
    bias: float


class GamedRow(_Row):
    """A row of `df_gamed.csv`: the baseline against itself, asked to be brief or verbose. It shows
    what length alone is worth."""

    model: str = Field(pattern=r"\S")
    share: float = Field(ge=0, le=1, validation_alias="preference")
    """P(the gamed answer is better)."""
    std_delta_length: FiniteFloat = Field(validation_alias="std_delta_len")
    difficulty: FiniteFloat = Field(validation_alias="instruction_difficulty")


class _Difficulty(_Row):
    place: int = Field(validation_alias=AliasChoices("index", ""))  # pandas' index has no name
    difficulty: FiniteFloat = Field(validation_alias="instruction_difficulty")


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthControlledWinRate:
    """What the win rate would be if both answers were equally long, in per cent."""

    rate: float
    standard_error: float | None
    """As the leaderboard gives it: the spread of the predictions over the instructions, without the
    fit's own uncertainty. None where predictions do not vary: without difficulties."""
    weights: Weights


def read_difficulties(path: Source) -> dict[int, float]:
    """Instruction difficulties by the instruction's place in AlpacaEval's set, from 0.

    Reads `instruction_difficulty.csv` and `df_gamed.csv` (where the first row of an index counts).

    Raises:
        UserError: the file cannot be read.
        UserErrors: rows that cannot be read, each with its field.
    """
    rows = read_rows(path, _Difficulty)
    return {row.place: row.difficulty for row in reversed(rows)}


def read_gamed(path: Source) -> list[GamedRow]:
    """The gamed baselines' rows, as `df_gamed.csv` has them; rows without preference are left out.

    Raises:
        UserError: the file cannot be read.
        UserErrors: rows that cannot be read, each with its field.
    """

    def parse(row: Record) -> GamedRow | None:
        return None if row.get("preference") == "" else GamedRow.model_validate(row)

    return [row for row in read_records(path, parse) if row is not None]


def difficulties_by_instruction(
    difficulties: dict[int, float],
    instructions: Sequence[str],
    rows: Sequence[Annotation | Output],
) -> list[float]:
    """Each row's difficulty by its instruction: rows may be missing or in any order.

    Args:
        instructions: AlpacaEval's set in its order, such as any complete `model_outputs.json` has.

    Raises:
        UserError: an instruction that is not in the set, or has no difficulty.
    """
    places = {instruction: place for place, instruction in enumerate(instructions)}
    for number, row in enumerate(rows, start=1):
        place = places.get(row.instruction)
        if place not in difficulties:
            missing = "is not in AlpacaEval's set" if place is None else "has no difficulty"
            raise UserError(
                f"this instruction {missing}",
                where=f"AlpacaEval, row {number}",
                expected="instructions of AlpacaEval's set, each with a difficulty",
                fix="give a complete table, or fit without difficulties",
            )
    return [difficulties[places[row.instruction]] for row in rows]


def length_controlled(
    annotations: Sequence[Annotation],
    difficulties: Sequence[float] | None = None,
    gamed: Sequence[GamedRow] = (),
) -> LengthControlledWinRate:
    """AlpacaEval 2's length-controlled win rate, from a fit of its GLM (arXiv 2404.04475, §3).

    Rows without a preference are not fitted, but predicted: the rate is over all instructions.

    Args:
        difficulties: one for each annotation; None fits without that term, as it must be for
            instructions that are not AlpacaEval's. That rate compares with no leaderboard's.
        gamed: the gamed baselines, which keep the length term near what length alone is worth;
            empty fits without this regularisation.

    Raises:
        UserError: too few judged rows to cross-validate; or no fit can separate length from
            quality, as all differences of length are the same, or (without gamed baselines) of
            one sign.
        ValueError: when the number of difficulties is not that of the annotations.
    """
    if difficulties is not None and len(difficulties) != len(annotations):
        raise ValueError(f"{len(difficulties)} difficulties, {len(annotations)} annotations")
    judged = [a.outcome is not None for a in annotations]
    if sum(judged) < FOLDS:
        raise UserError(
            f"{sum(judged)} judged annotations are too few", expected=f"{FOLDS} or more"
        )
    if all(a.generator_1 == a.generator_2 for a in annotations):  # by construction, as published
        weights = Weights(0, 0, 0)
    else:
        _check_lengths([a.delta_length for a in annotations], alone=not gamed)
        weights = _fit(_examples(annotations, difficulties, gamed), difficulties is not None)
    return predicted(weights, [0.0] * len(annotations) if difficulties is None else difficulties)


def predicted(weights: Weights, difficulties: Sequence[float]) -> LengthControlledWinRate:
    """The rate under given weights: 100 · mean σ(difficulty · d + bias), the length term set to 0.

    Args:
        difficulties: of every instruction that the rate is over.
    """
    from scipy.special import expit

    shares = expit(weights.difficulty * np.array(difficulties, dtype=float) + weights.bias)
    return LengthControlledWinRate(
        rate=100 * float(shares.mean()),
        standard_error=_standard_error(shares) if len(set(difficulties)) > 1 else None,
        weights=weights,
    )


class _Examples(NamedTuple):
    """What the GLM is fitted on: n rows, the gamed baselines' first."""

    features: np.ndarray
    """(n, 3): tanh(Δlen / std), difficulty, and 1 for the model's rows, 0 for the gamed."""
    shares: np.ndarray
    """(n,) soft labels, P(the answer is better)."""
    importance: np.ndarray
    """(n,) sample weights."""


def _examples(
    annotations: Sequence[Annotation],
    difficulties: Sequence[float] | None,
    gamed: Sequence[GamedRow],
) -> _Examples:
    lengths = standardised([a.delta_length for a in annotations])
    hard = [0.0] * len(annotations) if difficulties is None else difficulties
    rows = [
        (length, difficulty, 1.0, a.outcome, 1.0)
        for a, length, difficulty in zip(annotations, lengths, hard, strict=True)
        if a.outcome is not None
    ]
    weight = GAMED_WEIGHT / max(len({g.model for g in gamed}), 1)
    games = [(g.std_delta_length, g.difficulty, 0.0, g.share, weight) for g in gamed]
    table = np.array([*games, *rows], dtype=float)
    table[:, 0] = np.tanh(table[:, 0])
    return _Examples(features=table[:, :3], shares=table[:, 3], importance=table[:, 4])


def _check_lengths(lengths: Sequence[int], *, alone: bool) -> None:
    """Refuse lengths from which no fit can estimate the rate at equal lengths.

    A fit that never saw the model's answer shorter, or never longer, splits quality between the
    bias and the length term as the penalty pleases: 50 % and 99 % come from one truth.
    """
    if not any(lengths):
        return
    if len(set(lengths)) == 1 or (alone and (min(lengths) > 0 or max(lengths) < 0)):
        which = "shorter" if lengths[0] > 0 else "longer"
        raise UserError(
            f"every answer of the model is {which} than the baseline's",
            expected="answers of which some are shorter and some longer",
            fix="fit with the gamed baselines, or report the plain win rate",
        )


def _fit(examples: _Examples, with_difficulty: bool) -> Weights:
    """The GLM, with the penalty that does best in cross-validation."""
    from sklearn.exceptions import ConvergenceWarning

    columns = [0, 1, 2] if with_difficulty else [0, 2]
    examples = examples._replace(features=examples.features[:, columns])
    fold = np.arange(len(examples.shares)) % FOLDS
    with warnings.catch_warnings():  # the candidates that do not converge lose, or do not matter
        warnings.simplefilter("ignore", ConvergenceWarning)
        losses = [
            fmean(_held_out_loss(examples, fold == held, strength) for held in range(FOLDS))
            for strength in CANDIDATES
        ]
    coefficients = dict(
        zip(columns, _regress(examples, CANDIDATES[np.argmin(losses)]), strict=True)
    )
    return Weights(*(float(coefficients.get(column, 0.0)) for column in range(3)))


def _held_out_loss(examples: _Examples, held: np.ndarray, strength: float) -> float:
    """Mean weighted log-loss of soft labels on the held-out rows.

    Holding out a row before it is doubled for its two labels is what AlpacaEval's grouped folds do.
    """
    from scipy.special import log_expit

    kept, tested = (_Examples(*(part[mask] for part in examples)) for mask in (~held, held))
    logits = tested.features @ _regress(kept, strength)
    gain = tested.shares * log_expit(logits) + (1 - tested.shares) * log_expit(-logits)
    return -float(np.mean(tested.importance * gain))


def _regress(examples: _Examples, strength: float) -> np.ndarray:
    """L1-penalised logistic regression on soft labels: each row as a win and as a loss, by weight.

    Solver and seed are AlpacaEval's; liblinear draws the order of its coordinates.
    """
    from sklearn.linear_model import LogisticRegression

    x, share, importance = examples
    model = LogisticRegression(
        C=strength, l1_ratio=1, solver="liblinear", fit_intercept=False, random_state=123
    )
    model.fit(
        np.vstack([x, x]),
        np.repeat([1, 0], len(x)),
        sample_weight=np.concatenate([share, 1 - share]) * np.tile(importance, 2),
    )
    return np.asarray(model.coef_[0])
