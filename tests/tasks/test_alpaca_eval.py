"""AlpacaEval 2: the published leaderboard from real annotations, and made-up data with known truth."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import read_annotations

from constitutions.errors import UserError, UserErrors
from tasks.benchmarks.alpaca_eval import data as ae
from tasks.judging.winrate import WinRate, win_rate

FIGURES = {
    "alpaca-7b": (2.591450540223603, 0.4870855382635108, (17, 785, 3)),
    "gpt-3.5-turbo-1106": (9.177964561962735, 0.8904117511864436, (64, 737, 4)),
}
LENGTH_CONTROLLED = {"alpaca-7b": 5.875487163278986, "gpt-3.5-turbo-1106": 19.30058903498905}
ODD = {"NullModel", "dbrx-instruct"}
"""Their published weights and rates are of different fits: no instruction set makes them agree."""


@pytest.fixture(scope="session")
def published(corpora: Path) -> Path:
    folder = corpora.parent / "alpaca_eval"
    if not folder.is_dir():
        pytest.skip(f"AlpacaEval's annotations are not at {folder}; see STAPLE_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def difficulties(published: Path) -> dict[int, float]:
    return ae.read_difficulties(published / "instruction_difficulty_recovered.csv")


def leaderboard(published: Path) -> dict[str, dict[str, str]]:
    with (published / "weighted_alpaca_eval_gpt4_turbo_leaderboard.csv").open() as file:
        return {row[""]: row for row in csv.DictReader(file)}


def weights_of(published: Path) -> dict[str, ae.Weights]:
    columns = "np.tanh(std_delta_len)", "instruction_difficulty", "not_gamed_baseline.astype(float)"
    with (published / "glm_weights_baseline_gpt4_1106_preview.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {row[""]: ae.Weights(*(float(row[column]) for column in columns)) for row in rows}


def rate_of(rows: Sequence[ae.Annotation]) -> WinRate:
    return win_rate([row.outcome for row in rows], seed=0, resamples=100)


def by_place(difficulties: dict[int, float], rows: Sequence[ae.Annotation]) -> list[float]:
    """The leaderboard's way: of a file from which rows were dropped, one place off."""
    return [difficulties[place] for place in range(len(rows))]


# The leaderboard


@pytest.mark.parametrize("model", FIGURES)
def test_the_leaderboards_figures(published: Path, model: str) -> None:
    rows = read_annotations(published / f"{model}.json")
    found, (rate, error, counts) = rate_of(rows), FIGURES[model]
    assert 100 * found.rate == pytest.approx(rate, abs=1e-9)
    assert ae.standard_error(rows) == pytest.approx(error, abs=1e-9)
    assert (found.wins, found.losses, found.ties) == counts
    assert (found.n, found.failed) == (805, 0)


@pytest.mark.parametrize("model", LENGTH_CONTROLLED)
def test_the_fit_lands_at_the_published_length_controlled_rate(
    published: Path, difficulties: dict[int, float], model: str
) -> None:
    annotations = read_annotations(published / f"{model}.json")
    gamed = ae.read_gamed(published / "df_gamed_surrogate.csv")
    fitted = ae.length_controlled(annotations, by_place(difficulties, annotations), gamed)
    assert fitted.rate == pytest.approx(LENGTH_CONTROLLED[model], abs=0.12)
    assert fitted.weights == pytest.approx(weights_of(published)[model], abs=0.02)


@pytest.mark.parametrize("model", LENGTH_CONTROLLED)
def test_without_the_gamed_baselines_it_is_another_fit(
    published: Path, difficulties: dict[int, float], model: str
) -> None:
    annotations = read_annotations(published / f"{model}.json")
    free = ae.length_controlled(annotations, by_place(difficulties, annotations))
    assert 0.5 < abs(free.rate - LENGTH_CONTROLLED[model]) < 2


def test_every_published_rate_follows_from_its_published_weights(
    published: Path, difficulties: dict[int, float]
) -> None:
    """Where rows were dropped from a file, the leaderboard read difficulties by place in it."""
    listed, hard = leaderboard(published), [difficulties[place] for place in range(805)]
    checked = short = 0
    for model, weights in weights_of(published).items():
        if model not in listed or model in ODD:
            continue
        row, rate = listed[model], float(listed[model]["length_controlled_winrate"])
        whole = ae.predicted(weights, hard)
        if whole.rate != pytest.approx(rate, abs=1e-6):
            short += 1
            whole = ae.predicted(weights, hard[: int(row["n_total"])])
        assert whole.rate == pytest.approx(rate, abs=1e-6), model
        if row["lc_standard_error"]:
            published_error = float(row["lc_standard_error"])
            assert whole.standard_error == pytest.approx(published_error, abs=1e-6), model
        checked += 1
    assert (checked, short) == (197, 8)


def test_difficulties_come_with_the_gamed_baselines_too(
    published: Path, difficulties: dict[int, float]
) -> None:
    also = ae.read_difficulties(published / "df_gamed_surrogate.csv")
    assert also == pytest.approx(difficulties, abs=1e-8)
    assert len({row.model for row in ae.read_gamed(published / "df_gamed_surrogate.csv")}) == 2


# The files


def annotation(**fields: Any) -> ae.Annotation:
    given: dict[str, Any] = {
        "instruction": "Say hello.",
        "output_1": "Hello, dear friend.",
        "generator_1": "baseline",
        "output_2": "Hello.",
        "generator_2": "ours",
        "annotator": "judge",
        "preference": 1.25,
    }
    return ae.Annotation(**{**given, **fields})


def test_annotations_survive_writing_and_reading(tmp_path: Path) -> None:
    rows = [
        annotation(dataset="koala"),
        annotation(preference=None, output_2=""),
        annotation(instruction="こんにちは 🙂\u2028", preference=2.0),
    ]
    ae.write(tmp_path / "annotations.json", rows)
    assert read_annotations(tmp_path / "annotations.json") == rows
    plain = json.loads((tmp_path / "annotations.json").read_text())
    assert plain[1]["preference"] is None and "dataset" not in plain[1]


def test_outputs_survive_writing_and_reading(tmp_path: Path) -> None:
    rows = [
        ae.Output(instruction="a", output="", generator="m", dataset="koala"),
        ae.Output(instruction="b", output="é", generator="m"),
    ]
    ae.write(tmp_path / "model_outputs.json", rows)
    assert ae.read_outputs(tmp_path / "model_outputs.json") == rows


def test_a_missing_generator_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model_outputs.json"
    path.write_text('[{"instruction": "a", "output": "b"}]')
    with pytest.raises(UserErrors, match=r"row 1: field 'generator'"):
        ae.read_outputs(path)


BAD: dict[str, list[tuple[object, str]]] = {
    "output": [(None, "null"), (7, "a number"), ("\udc80", "broken")],
    "generator": [("  ", "blank")],
    "instruction": [(3, "a number")],
}


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, values in BAD.items() for v, _ in values], ids=repr
)
def test_a_bad_value_is_named_by_file_row_and_field(
    tmp_path: Path, field: str, value: object
) -> None:
    path = tmp_path / "model_outputs.json"
    rows: list[dict[str, object]] = [
        {"instruction": f"Say {n}.", "output": "It.", "generator": "m"} for n in range(3)
    ]
    rows[1][field] = value
    path.write_text(json.dumps(rows))
    with pytest.raises(UserErrors) as caught:
        ae.read_outputs(path)
    assert f"{path}, row 2: field '{field}'" in str(caught.value)
    assert len(caught.value.errors) == 1


def test_all_bad_rows_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "model_outputs.json"
    rows: list[object] = [{"instruction": "a"}, 7] * 15
    path.write_text(json.dumps(rows))
    with pytest.raises(UserErrors) as caught:
        ae.read_outputs(path)
    assert "row 1: field 'output'" in str(caught.value)
    assert f"{path}, row 2: the value is of type int" in str(caught.value)
    assert (len(caught.value.errors), caught.value.more) == (20, 10)


def test_a_file_of_two_models_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model_outputs.json"
    ae.write(path, [ae.Output(instruction=n, output="x", generator=n) for n in ("one", "another")])
    with pytest.raises(UserError, match="field 'generator': this row is an answer of 'another'"):
        ae.read_outputs(path)


@pytest.mark.parametrize("content", [None, "[]", "[{", '{"a": 1}'])
def test_a_file_without_rows_is_an_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "model_outputs.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"model_outputs\.json"):
        ae.read_outputs(path)


def test_a_table_says_which_number_is_none(tmp_path: Path) -> None:
    path = tmp_path / "difficulty.csv"
    path.write_text(",instruction_difficulty\n0,0.5\n1,hard\n")
    with pytest.raises(UserErrors, match=r"row 2: field 'instruction_difficulty': .*valid number"):
        ae.read_difficulties(path)


# Made-up data


def test_the_win_rate_by_hand() -> None:
    """Shares 1, 0, .5 (written as 0), .5 and .75; one judgement failed."""
    rows = [annotation(preference=p) for p in (2.0, 1.0, 0.0, None, 1.5, 1.75)]
    found = rate_of(rows)
    assert (found.wins, found.losses, found.ties, found.failed, found.n) == (2, 1, 2, 1, 5)
    assert found.rate == pytest.approx(2.75 / 5)
    deviations = [0.45, -0.55, -0.05, -0.05, 0.2]
    expected = 100 * np.sqrt(sum(d * d for d in deviations) / 4 / 5)
    assert ae.standard_error(rows) == pytest.approx(expected)
    assert ae.standard_error(rows[:1]) is None


def world(
    *,
    length: float = 0.0,
    difficulty: float = 0.0,
    bias: float = 0.0,
    longer: float = 0.0,
    n: int = 600,
    seed: int = 0,
) -> list[ae.Annotation]:
    """Judgements that follow the GLM; the baseline is `longer` by so many characters on average."""
    rng = np.random.default_rng(seed)
    delta = (longer + 100 * rng.standard_normal(n)).astype(int)
    hard = np.array(hardness(n))
    logits = length * np.tanh(delta / delta.std(ddof=1)) + difficulty * hard + bias
    shares = 1 / (1 + np.exp(-logits))
    return [
        annotation(
            instruction=f"instruction {i}",
            output_1="a" * (1000 + int(d)),
            output_2="b" * 1000,
            preference=float(1 + s),
        )
        for i, (d, s) in enumerate(zip(delta, shares, strict=True))
    ]


def hardness(n: int = 600) -> list[float]:
    return np.random.default_rng(99).standard_normal(n).tolist()


def swapped(row: ae.Annotation) -> ae.Annotation:
    return row.model_copy(
        update={
            "output_1": row.output_2,
            "output_2": row.output_1,
            "generator_1": row.generator_2,
            "generator_2": row.generator_1,
            "preference": None if row.preference is None else 3 - row.preference,
        }
    )


def test_the_effect_of_length_is_removed_when_only_length_decides() -> None:
    """The model is longer on average and the judge likes that: equal lengths would be equal."""
    rows = world(length=-2.0, longer=-100)
    assert rate_of(rows).rate > 0.65
    assert ae.length_controlled(rows, hardness()).rate == pytest.approx(50, abs=0.5)
    assert ae.length_controlled(rows).rate == pytest.approx(50, abs=0.5)


def test_the_glm_recovers_the_weights_that_made_the_judgements() -> None:
    truth = ae.Weights(length=-1.5, difficulty=0.8, bias=0.6)
    fitted = ae.length_controlled(world(**truth._asdict(), longer=60), hardness())
    assert fitted.weights == pytest.approx(truth, abs=0.05)
    assert fitted.rate == pytest.approx(ae.predicted(truth, hardness()).rate, abs=0.5)


def test_swapping_the_sides_gives_the_complement() -> None:
    rows = world(length=-1.5, difficulty=0.8, bias=0.6, longer=60)
    others = [swapped(row) for row in rows]
    win, lose = rate_of(rows), rate_of(others)
    assert lose.rate == pytest.approx(1 - win.rate)
    assert (lose.wins, lose.losses, lose.ties) == (win.losses, win.wins, win.ties)
    ours, theirs = (ae.length_controlled(side, hardness()) for side in (rows, others))
    assert theirs.rate == pytest.approx(100 - ours.rate, abs=1e-3)
    w = ours.weights
    assert theirs.weights == pytest.approx((w.length, -w.difficulty, -w.bias), abs=1e-3)


def drawn(rows: list[ae.Annotation]) -> list[ae.Annotation]:
    """The same judgements by a judge that says only who wins."""
    rng = np.random.default_rng(11)
    return [
        row.model_copy(update={"preference": 1.0 + (rng.random() < (row.outcome or 0))})
        for row in rows
    ]


GAMED = [
    ae.GamedRow(
        model=model,
        share=1 / (1 + np.exp(0.5 * np.tanh(d))),
        std_delta_length=d,
        difficulty=0.0,
    )
    for model, sign in (("concise", 1), ("verbose", -1))
    for d in sign * np.abs(np.random.default_rng(5).standard_normal(800))
]


@pytest.mark.parametrize("seed", range(4))
def test_gamed_baselines_hold_the_length_term_where_lengths_say_little(seed: int) -> None:
    """A better model that is nearly always longer: its verdicts alone blame or credit length."""
    rows = drawn(world(length=-0.5, bias=1.5, longer=-180, n=200, seed=seed))
    free, held = ae.length_controlled(rows).weights, ae.length_controlled(rows, gamed=GAMED).weights
    assert abs(held.length + 0.5) < 0.5 * abs(free.length + 0.5)


@pytest.mark.parametrize(("longer", "which"), [(-900, "longer"), (900, "shorter")])
def test_lengths_on_one_side_need_the_gamed_baselines(longer: int, which: str) -> None:
    rows = drawn(world(length=-0.5, bias=1.0, longer=longer, n=200))
    with pytest.raises(UserError, match=f"is {which} than the baseline's.*gamed baselines"):
        ae.length_controlled(rows)
    truth = ae.predicted(ae.Weights(-0.5, 0.0, 1.0), [0.0]).rate
    assert ae.length_controlled(rows, gamed=GAMED).rate == pytest.approx(truth, abs=8)


def test_without_difficulties_the_term_is_left_out() -> None:
    rows = world(length=-1.0, difficulty=1.0, bias=0.5)
    plain, full = ae.length_controlled(rows), ae.length_controlled(rows, hardness())
    assert plain.weights.difficulty == 0 and plain.standard_error is None
    assert full.weights.difficulty > 0.9 and full.standard_error is not None


def test_a_missing_difficulty_is_an_error_that_names_the_row() -> None:
    rows, known = world(n=10), dict(enumerate(hardness(10)))
    del known[7]
    names = [row.instruction for row in rows]
    with pytest.raises(UserError, match=r"this instruction has no difficulty"):
        ae.difficulties_by_instruction(known, names, rows)
    with pytest.raises(UserError, match=r"row 3.*not in AlpacaEval's set"):
        ae.difficulties_by_instruction(known, names[:2], rows)
    with pytest.raises(ValueError, match="9 difficulties, 10 annotations"):
        ae.length_controlled(rows, hardness(10)[:9])


def test_a_dropped_row_shifts_no_difficulty() -> None:
    rows, known = world(n=10), dict(enumerate(hardness(10)))
    names, short = [row.instruction for row in rows], rows[:4] + rows[5:]
    right = [known[i] for i in (0, 1, 2, 3, 5, 6, 7, 8, 9)]
    assert ae.difficulties_by_instruction(known, names, short) == right


def test_failed_judgements_are_predicted_but_not_fitted() -> None:
    rows = world(length=-1.0, difficulty=1.0, bias=0.5)
    hard = [3.0 if i < 50 else d for i, d in enumerate(hardness())]
    failed = [
        row.model_copy(update={"preference": None}) if i < 50 else row for i, row in enumerate(rows)
    ]
    fitted = ae.length_controlled(failed, hard)
    assert fitted.weights == pytest.approx((-1.0, 1.0, 0.5), abs=0.05)
    assert fitted.rate == ae.predicted(fitted.weights, hard).rate


def test_the_baseline_against_itself_is_half_by_construction() -> None:
    rows = [row.model_copy(update={"generator_2": "baseline"}) for row in world(bias=1.0, n=20)]
    assert ae.length_controlled(rows).rate == 50


def test_equal_lengths_leave_the_win_rate() -> None:
    rows = [row.model_copy(update={"output_2": row.output_1}) for row in world(bias=0.7, n=100)]
    plain = 100 * rate_of(rows).rate
    assert ae.length_controlled(rows).rate == pytest.approx(plain, abs=0.1)


def test_a_constant_difference_of_length_is_refused() -> None:
    rows = [row.model_copy(update={"output_2": row.output_1 + "more"}) for row in world(n=20)]
    with pytest.raises(UserError, match="is longer than the baseline's"):
        ae.length_controlled(rows, gamed=GAMED)


def test_too_few_judgements_are_refused() -> None:
    rows = [
        r.model_copy(update={"preference": None}) if i > 3 else r for i, r in enumerate(world(n=20))
    ]
    with pytest.raises(UserError, match="4 judged annotations are too few"):
        ae.length_controlled(rows)
