"""IFEval: the official flags on real responses, each check's definition, and loose ⊇ strict."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constitutions.errors import UserError
from tasks.benchmarks.ifeval.data import (
    CHECKS,
    InstructedPrompt,
    InstructionChecks,
    accuracies,
    capital_words,
    detected_language,
    follows,
    ifeval_metrics,
    read_examples,
    variants,
    verdict,
    verdicts,
)

UNREPEATABLE = {(1122, "keywords:letter_frequency", "loose")}
"""Official flags that no program can agree with. Key 1122 asks for at least four #. The checker
that wrote the flags drew a random letter in place of any sign that is not a letter, anew for the
strict and the loose flag: so it says that the response follows the instruction strictly (it has
four #) but not loosely, which is impossible. Later versions of the reference count the sign."""


@pytest.fixture(scope="module")
def ifeval(corpora: Path) -> Path:
    return corpora.parent / "ifeval"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def judged(ifeval: Path) -> list[tuple[InstructedPrompt, InstructionChecks]]:
    """GPT-4's first 200 responses, joined by prompt."""
    responses = {
        row["prompt"]: row["response"] for row in lines(ifeval / "responses_gpt4_first200.jsonl")
    }
    examples = [e for e in read_examples(ifeval / "input_data.jsonl") if e.prompt in responses]
    assert len(examples) == 200
    found = verdicts(examples, {e.key: responses[e.prompt] for e in examples})
    return list(zip(examples, found, strict=True))


@pytest.mark.parametrize("mode", ["strict", "loose"])
def test_every_flag_is_the_official_one(
    ifeval: Path, judged: list[tuple[InstructedPrompt, InstructionChecks]], mode: str
) -> None:
    rows = lines(ifeval / f"results_{mode}_first200.jsonl")
    official = {row["prompt"]: row["follow_instruction_list"] for row in rows}
    differing, compared = set(), 0
    for example, found in judged:
        flags = zip(getattr(found, mode), official[example.prompt], strict=True)
        for name, (ours, theirs) in zip(example.instruction_id_list, flags, strict=True):
            compared += 1
            if ours != theirs:
                differing.add((example.key, name, mode))
    assert compared == 318
    assert differing == {case for case in UNREPEATABLE if case[2] == mode}


def test_the_official_accuracies(
    ifeval: Path, judged: list[tuple[InstructedPrompt, InstructionChecks]]
) -> None:
    figures = accuracies([v for _, v in judged], seed=0)
    for mode in ("strict", "loose"):
        rows = lines(ifeval / f"results_{mode}_first200.jsonl")
        flags = [row["follow_instruction_list"] for row in rows]
        extra = sum(case[2] == mode for case in UNREPEATABLE)
        assert figures[f"prompt_{mode}"].rate == (sum(map(all, flags)) + extra) / 200
        assert figures[f"instruction_{mode}"].rate == (sum(map(sum, flags)) + extra) / 318
    for figure in figures.values():
        assert figure.low < figure.rate < figure.high


def test_the_published_file_has_every_type_and_only_those(ifeval: Path) -> None:
    examples = read_examples(ifeval / "input_data.jsonl")
    assert len(examples) == 540
    assert {name for e in examples for name in e.instruction_id_list} == set(CHECKS)
    assert len(CHECKS) == 25


def test_capital_words_are_counted_as_nltk_does(ifeval: Path) -> None:
    nltk = pytest.importorskip("nltk.tokenize", reason="NLTK comes with rouge-score")
    words = nltk.NLTKWordTokenizer().tokenize
    texts = [row["response"] for row in lines(ifeval / "responses_gpt4_first200.jsonl")]
    import punkt

    for text in (t for x in texts for t in (x, x.upper())):
        sentences = punkt.sent_tokenize(text)
        expected = sum(word.isupper() for s in sentences for word in words(s))
        assert capital_words(text) == expected


# Every definition, by hand: (type, arguments, responses that follow, responses that do not).
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["fox", "a.b"]}, ["Foxes: A.B"], ["fox aXb", "a.b"]),
    ("keywords:frequency", {"keyword": "it", "frequency": 2, "relation": "at least"}, ["It bit", "it, it, it"], ["it", "none"]),
    ("keywords:frequency", {"keyword": "it", "frequency": 2, "relation": "less than"}, ["it", "none"], ["It bit"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "do"]}, ["concatenate, doing"], ["Do it.", "a CAT"]),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 2, "let_relation": "at least"}, ["Eve"], ["ewok"]),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 2, "let_relation": "less than"}, ["ewok"], ["Eve"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": "at least"}, ["Oh! No!"], ["Oh!"]),
    ("language:response_language", {"language": "de"}, ["Das ist ein ganz gewöhnlicher deutscher Satz.", "123 456"], ["This is a plain English sentence."]),
    ("change_case:english_capital", {}, ["THIS IS A PLAIN ENGLISH SENTENCE, ISN'T IT?"], ["THIS IS a PLAIN SENTENCE", "DAS IST EIN GANZ GEWÖHNLICHER DEUTSCHER SATZ", "123"]),
    ("change_case:english_lowercase", {}, ["this is a plain english sentence, isn't it?"], ["This is plain english", "das ist ein ganz gewöhnlicher deutscher satz", "123"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, ["I AM.", "IT'S", "CANNOT", "A--B", "NASA (ESA)", "U.S. I"], ["A-B", "NASA's it", "Nasa ESA"]),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, ["NASA", "none"], ["NASA, ESA"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["one two three", "don't stop"], ["one two", "- - -"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["one two"], ["one two three"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, ["Dr. Smith left. He ran.", "Yes! No?"], ["Dr. Smith left at 3.15 p.m. in a hurry", "one\n\ntwo"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, ["Mr. and Mrs. Jones of Acme Inc. agree."], ["Yes. No."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb", "***a***b***", "a *** b ***\n"], ["a", "a\n***\n***\nb", "a***b***c"]),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Elm"}, ["a\n\nelm trees", "a\n\n\"ELM!\" he said", "a\n\n'Elm's"], ["elm\n\na", "a\n\nelms", "a\n\nelm\n\nb", "\n\nelm", "elm"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] and [b]", "[][]"], ["[a]", "[a\n] [b]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye\nP.S. more", "p. s. more", "x p.s.y"], ["PS more", "P.S more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S more", "p. p. s."], ["P.S. more", "PPS"]),
    ("detectable_content:postscript", {"postscript_marker": "Note (end)"}, ["note (end): more"], ["note: more"]),
    ("detectable_format:constrained_response", {}, ["My answer is yes.", "Well. My answer is maybe. Thanks"], ["Yes.", "My answer is yes", "my answer is no."]),
    ("detectable_format:json_format", {}, ['{"a": 1}', '```json\n{"a": [1]}\n```', "```\n3\n```"], ['Here: {"a": 1}', "{a: 1}", "[" * 100_000]),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2}, ["Section 1\na\nSection 2\nb", "Section1 Section 22 Section 3"], ["Section 1\na\nSECTION 2", "Section one Section two"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ["* a\n* b", "- a\n  * b", "Text\n* a\n\n*b"], ["* a", "* a\n* b\n- c", "**a**\n* b"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* and *b*", "**a** *b*", "***a***"], ["*a*", "**a**", "* *\n*b*", "*a\nb* *c"]),
    ("detectable_format:title", {}, ["<<Poem of joy>>\ntext", "<<<a>>>"], ["<Poem>", "<< >>", "<<a\nb>>"]),
    ("punctuation:no_comma", {}, ["No commas here; none."], ["One, two"]),
    ("combination:two_responses", {}, ["a\n******\nb", "******a******b******"], ["a", "a******a ", "a******b******c", "a************b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi. "}, [" SAY HI. Hi!"], ["Hi! Say hi."]),
    ("startend:end_checker", {"end_phrase": " Is that all? "}, ["Yes. is THAT all?", '"Is that all?"\n'], ["Is that all? Yes.", "Is that all"]),
    ("startend:quotation", {}, ['"all of it"', ' "a" and "b" '], ['"', 'say "hi"', "'a'", "“a”"]),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].partition(":")[2])
def test_definition(case: tuple[str, dict[str, Any], list[str], list[str]]) -> None:
    name, arguments, good, bad = case
    example = InstructedPrompt(
        key=1, prompt="p", instruction_id_list=(name,), arguments=(arguments,)
    )
    for response in good:
        assert verdict(example, response).strict == (True,), response
    for response in bad:
        assert verdict(example, response).strict == (False,), response


def test_every_type_has_a_case_by_hand() -> None:
    assert {case[0] for case in CASES} == set(CHECKS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].partition(":")[2])
def test_an_empty_response_follows_nothing(
    case: tuple[str, dict[str, Any], list[str], list[str]],
) -> None:
    assert not any(follows(blank, case[0], case[1]) for blank in ("", " \n"))


def test_the_eight_variants() -> None:
    assert set(variants("Sure:\n\n*a*\nBye")) == {
        "Sure:\n\n*a*\nBye", "*a*\nBye", "Sure:\n\n*a*", "*a*",
        "Sure:\n\na\nBye", "a\nBye", "Sure:\n\na", "a",
    }  # fmt: skip


def test_loose_forgives_a_preface_a_farewell_and_markdown() -> None:
    example = InstructedPrompt(
        key=1, prompt="p", instruction_id_list=("startend:quotation",), arguments=({},)
    )
    for response in ('Sure:\n"a"', '"a"\nBye', 'Sure:\n"a"\nBye', '**"a"**'):
        found = verdict(example, response)
        assert (found.strict, found.loose) == ((False,), (True,)), response
    assert verdict(example, 'Well, "a"').loose == (False,)


PIECES = [
    "*",
    "***",
    "******",
    "\n",
    "\n\n",
    '"',
    "<<a>>",
    "[x]",
    "Section 1",
    "P.S.",
    ",",
    "IT",
    "it is",
    ". ",
    "- ",
    "{}",
    "word ",
    "é",
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_what_follows_strictly_follows_loosely(response: str) -> None:
    names, arguments = zip(*((name, given) for name, given, *_ in CASES), strict=True)
    example = InstructedPrompt(key=1, prompt="p", instruction_id_list=names, kwargs=arguments)
    found = verdict(example, response)
    assert all(loose for strict, loose in zip(found.strict, found.loose, strict=True) if strict)


def test_a_text_has_the_same_language_in_every_process_and_without_a_network() -> None:
    """On texts where langdetect's own `detect` says now this, now that."""
    texts = ["taxi radio video", "bon voyage my friend", "The house is big. Das Haus ist alt."] * 8
    code = f"""
import socket
socket.socket = socket.create_connection = None
from tasks.benchmarks.ifeval.data import detected_language, follows
print([detected_language(t) for t in {texts!r}])
assert follows("A. B c.", "length_constraints:number_sentences", dict(num_sentences=1, relation="at least"))
"""
    root = Path(__file__).parent.parent.parent
    answers = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=root, check=True, capture_output=True
        ).stdout
        for _ in range(2)
    }
    here = [detected_language(t) for t in texts]
    assert answers == {f"{here}\n".encode()}
    assert len(set(zip(texts, here, strict=True))) == len(set(texts))


def row(**changes: Any) -> str:
    given = {
        "key": 1,
        "prompt": "p",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
    return json.dumps(given | changes)


BAD_ROWS = {
    "there is no instruction type made:up": row(instruction_id_list=["made:up"]),
    "2 for 1 instructions": row(kwargs=[{}, {}]),
    "length_constraints:number_words: relation: Field required": row(instruction_id_list=["length_constraints:number_words"], kwargs=[{"num_words": 3}]),
    "Input should be 'less than' or 'at least'": row(instruction_id_list=["length_constraints:number_words"], kwargs=[{"num_words": 3, "relation": "about"}]),
    "num_words: Input should be a valid integer": row(instruction_id_list=["length_constraints:number_words"], kwargs=[{"num_words": "many", "relation": "at least"}]),
    "letter: String should have at most 1 character": row(instruction_id_list=["keywords:letter_frequency"], kwargs=[{"letter": "ab", "let_frequency": 1, "let_relation": "at least"}]),
    "surprise: Extra inputs are not permitted": row(kwargs=[{"surprise": 1}]),
    "field 'key'": row(key="first"),
    "this is not JSON": "{",
    "0 occurs a second time": row(key=0),
}  # fmt: skip


def test_every_bad_row_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "input_data.jsonl"
    path.write_text("\n".join([row(key=0), *BAD_ROWS.values()]))
    with pytest.raises(UserError) as caught:
        read_examples(path)
    errors = str(caught.value).splitlines()
    assert len(errors) == len(BAD_ROWS)
    for number, (message, line) in enumerate(zip(BAD_ROWS, errors, strict=True), start=2):
        assert message in line
        assert line.startswith(f"{path}, row {number}: ")


def test_null_arguments_are_none_as_the_hub_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "input_data.jsonl"
    path.write_text(row(kwargs=[{"num_words": None, "relation": None}]))
    assert read_examples(path)[0].arguments == ({},)


@pytest.mark.parametrize("content", [None, ""])
def test_a_file_without_rows_is_the_users_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "input_data.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="there is no such file" if content is None else "no row"):
        read_examples(path)


def test_a_missing_response_is_named_and_never_shifts_the_others() -> None:
    examples = [
        InstructedPrompt(
            key=k, prompt=str(k), instruction_id_list=("punctuation:no_comma",), arguments=({},)
        )
        for k in (7, 8)
    ]
    with pytest.raises(UserError, match="1 prompts have no response: 7"):
        verdicts(examples, {8: "a"})
    found = verdicts(examples, {8: "a", 7: "a, b"})
    assert [(v.key, v.strict) for v in found] == [(7, (False,)), (8, (True,))]


def test_accuracies_of_hand_made_verdicts() -> None:
    flags = [(True, True, True), (True, False), (False,), (True,)]
    made = [InstructionChecks(key=i, strict=f, loose=(True,) * len(f)) for i, f in enumerate(flags)]
    figures = accuracies(made, seed=0)
    assert figures["prompt_strict"].rate == 2 / 4
    assert figures["instruction_strict"].rate == 5 / 7
    assert figures["prompt_loose"].rate == figures["instruction_loose"].rate == 1
    metrics = ifeval_metrics(made, seed=0)
    assert len(metrics) == 12
    assert metrics["ifeval/prompt_strict_low"] == figures["prompt_strict"].low
    with pytest.raises(ValueError, match="no verdict"):
        accuracies([], seed=0)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Prompts of 1 to 3 instructions that are followed together or not at all: clustered."""
    import numpy as np

    rng = np.random.default_rng(0)
    covered = []
    for trial in range(1000):
        sizes, hits = rng.integers(1, 4, 200), rng.random(200) < 0.7
        made = [
            InstructionChecks(key=i, strict=(bool(h),) * int(n), loose=(bool(h),) * int(n))
            for i, (n, h) in enumerate(zip(sizes, hits, strict=True))
        ]
        found = accuracies(made, seed=trial, resamples=500)["instruction_strict"]
        covered.append(found.low <= 0.7 <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.97
