"""IFEval: does a response follow instructions that a program can check?

The benchmark of Zhou et al., "Instruction-Following Evaluation for Large Language Models"
(arXiv 2311.07911): 541 prompts with 25 types of instruction. `read_examples` reads the published
file, `verdict` checks one response, `accuracies` sums up. Nothing is downloaded, and the same
response always gets the same verdict.

The checks follow the reference implementation (google-research, `instruction_following_eval`),
quirks included, for a score is worth its comparability. What differs:

- keywords, section markers and postscript markers are plain text, not regular expressions (the
  published prompts have none that would differ);
- an argument that is missing or of the wrong kind is the user's error, where the reference draws
  one at random (its first versions also in place of a "letter" that is a sign: #, !);
- the language detector is the reference's, with a fixed seed and order. The reference's own draws
  noise: a text so short or mixed that its answer changes between runs has no official flag;
- sentences are split with the same Punkt model, by another implementation of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
)

from constitutions.errors import UserError
from tasks.benchmarks.rows import Source, clustered_mean, read_rows
from tasks.judging.rates import interval_metrics
from tasks.judging.winrate import Mean

Relation = Literal["less than", "at least"]
Amount = Annotated[int, Field(ge=0)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Texts = Annotated[tuple[Text, ...], Field(min_length=1)]
Letter = Annotated[str, StringConstraints(min_length=1, max_length=1)]

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""The answers that a constrained response chooses from."""

Check = Callable[..., bool]
"""(response, **arguments) to whether the response follows the instruction."""

CHECKS: dict[str, Check] = {}
"""The check of each instruction type, by its published name."""


NEEDS = {
    "language:response_language": "langdetect",
    "change_case:english_capital": "langdetect",
    "change_case:english_lowercase": "langdetect",
    "length_constraints:number_sentences": "punkt",
}
"""The optional package that a check measures with."""


def _checks(name: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return register


class InstructedPrompt(BaseModel):
    """One prompt and its instructions, a row of `input_data.jsonl`."""

    model_config = ConfigDict(frozen=True)

    key: int
    prompt: str
    instruction_id_list: Annotated[tuple[str, ...], Field(min_length=1)]
    arguments: tuple[dict[str, Any], ...] = Field(
        validation_alias=AliasChoices("kwargs", "arguments")
    )
    """The arguments of each instruction, in their order; those that are null do not count."""

    @field_validator("instruction_id_list")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(names) - set(CHECKS))
        if unknown:
            raise ValueError(f"there is no instruction type {', '.join(unknown)}")
        return names

    @field_validator("arguments")
    @classmethod
    def _fitting(
        cls, kwargs: tuple[dict[str, Any], ...], info: ValidationInfo
    ) -> tuple[dict[str, Any], ...]:
        names = info.data.get("instruction_id_list")
        if names is None:  # reported already
            return kwargs
        if len(names) != len(kwargs):
            raise ValueError(f"{len(kwargs)} for {len(names)} instructions")
        return tuple(_arguments(n, given) for n, given in zip(names, kwargs, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionChecks:
    """Whether a response follows each instruction of its prompt, in their order."""

    key: int
    strict: tuple[bool, ...]
    """The response as it is."""
    loose: tuple[bool, ...]
    """Any of its `variants`."""


def read_examples(path: Source) -> list[InstructedPrompt]:
    """The prompts of IFEval's `input_data.jsonl`, or of the hub's copy of it.

    Raises:
        UserError: the file cannot be read.
        UserErrors: its rows that are not as expected.
    """
    return read_rows(path, InstructedPrompt, lambda row: row.key)


def verdicts(
    examples: Sequence[InstructedPrompt], responses: Mapping[int, str]
) -> list[InstructionChecks]:
    """The verdict on every example's response, joined by key.

    Raises:
        UserError: an example has no response; an empty one is a response that follows nothing.
    """
    missing = [e.key for e in examples if e.key not in responses]
    if missing:
        keys = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
        raise UserError(f"{len(missing)} prompts have no response: {keys}", where="IFEval")
    return [verdict(e, responses[e.key]) for e in examples]


def verdict(example: InstructedPrompt, response: str) -> InstructionChecks:
    """Whether the response follows each of the example's instructions, strictly and loosely."""
    asked = list(zip(example.instruction_id_list, example.arguments, strict=True))
    texts = variants(response)
    strict = tuple(follows(response, name, given) for name, given in asked)
    loose = tuple(any(follows(t, name, given) for t in texts) for name, given in asked)
    return InstructionChecks(key=example.key, strict=strict, loose=loose)


def follows(response: str, instruction: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a response follows one instruction; an empty response follows none."""
    return bool(response.strip()) and CHECKS[instruction](response, **arguments)


def variants(response: str) -> tuple[str, ...]:
    """The eight texts of loose checking, the response itself first.

    Every combination of: without its first line, without its last line (a preface, a farewell),
    without asterisks (markdown).
    """
    lines = response.split("\n")
    cut = [lines[1:], lines[:-1], lines[1:-1]]
    texts = [response, *("\n".join(kept).strip() for kept in cut)]
    return (*texts, *(text.replace("*", "") for text in texts))


def accuracies(
    verdicts: Sequence[InstructionChecks], *, seed: int, resamples: int = 10_000
) -> dict[str, Mean]:
    """The benchmark's four figures in [0, 1]: "prompt_strict", "instruction_strict", and loose.

    A prompt counts when every instruction in it is followed. The intervals are percentiles of a
    bootstrap over prompts, also for instructions: those of one prompt share its response.

    Raises:
        ValueError: there is no verdict.
    """
    if not verdicts:
        raise ValueError("there is no verdict to average")
    figures = {}
    for mode in ("strict", "loose"):
        flags: list[tuple[bool, ...]] = [getattr(v, mode) for v in verdicts]
        whole = [(float(all(f)), 1) for f in flags]
        single = [(float(sum(f)), len(f)) for f in flags]
        for unit, counts in (("prompt", whole), ("instruction", single)):
            figures[f"{unit}_{mode}"] = clustered_mean(counts, seed=seed, resamples=resamples)
    return figures


def ifeval_metrics(
    verdicts: Sequence[InstructionChecks], *, seed: int, resamples: int = 10_000
) -> dict[str, float]:
    """The four figures and their intervals under flat names, as MLflow charts them.

    Raises:
        ValueError: there is no verdict.
    """
    figures: dict[str, float] = {}
    for name, found in accuracies(verdicts, seed=seed, resamples=resamples).items():
        figures |= interval_metrics(f"ifeval/{name}", found)
    return figures


@cache
def _arguments_model(name: str) -> type[BaseModel]:
    """What a check takes beside the response, from its annotations."""
    hints = get_type_hints(CHECKS[name], include_extras=True)
    fields: Any = {n: (h, ...) for n, h in hints.items() if n not in ("response", "return")}
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


def _arguments(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the check of this name takes them; raises ValueError naming the wrong."""
    known = {key: value for key, value in given.items() if value is not None}
    try:
        return dict(_arguments_model(name).model_validate(known))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"{name}: {'; '.join(wrong)}") from None


def _related(count: int, relation: Relation, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


def _occurrences(text: str, response: str) -> int:
    return len(re.findall(re.escape(text), response, flags=re.IGNORECASE))


# Keywords


@_checks("keywords:existence")
def _keywords(response: str, *, keywords: Texts) -> bool:
    """Every keyword occurs, in any case, also inside longer words."""
    return all(_occurrences(keyword, response) for keyword in keywords)


@_checks("keywords:frequency")
def _keyword_frequency(
    response: str, *, keyword: Text, frequency: Amount, relation: Relation
) -> bool:
    """Counted in any case, also inside longer words."""
    return _related(_occurrences(keyword, response), relation, frequency)


@_checks("keywords:forbidden_words")
def _forbidden_words(response: str, *, forbidden_words: Texts) -> bool:
    """None occurs as a whole word, in any case."""
    found = (rf"\b{re.escape(word)}\b" for word in forbidden_words)
    return not any(re.search(word, response, flags=re.IGNORECASE) for word in found)


@_checks("keywords:letter_frequency")
def _letter_frequency(
    response: str, *, letter: Letter, let_frequency: Amount, let_relation: Relation
) -> bool:
    """Counted in any case; the "letter" may be a sign such as #."""
    return _related(response.lower().count(letter.lower()), let_relation, let_frequency)


# Language and case


@_checks("language:response_language")
def _language(response: str, *, language: Text) -> bool:
    """By ISO 639-1 code. A text in which no language shows (numbers, emoji) passes."""
    return detected_language(response) in (None, language)


@_checks("change_case:english_capital")
def _capital(response: str) -> bool:
    return response.isupper() and detected_language(response) in (None, "en")


@_checks("change_case:english_lowercase")
def _lowercase(response: str) -> bool:
    return response.islower() and detected_language(response) in (None, "en")


@_checks("change_case:capital_word_frequency")
def _capital_words(response: str, *, capital_frequency: Amount, capital_relation: Relation) -> bool:
    return _related(capital_words(response), capital_relation, capital_frequency)


# Length


@_checks("length_constraints:number_words")
def _words(response: str, *, num_words: Amount, relation: Relation) -> bool:
    """A word is a run of letters, digits and underscores: "don't" has two."""
    return _related(len(re.findall(r"\w+", response)), relation, num_words)


@_checks("length_constraints:number_sentences")
def _sentences(response: str, *, num_sentences: Amount, relation: Relation) -> bool:
    return _related(len(_punkt().tokenize(response)), relation, num_sentences)


@_checks("length_constraints:number_paragraphs")
def _paragraphs(response: str, *, num_paragraphs: Amount) -> bool:
    """Exactly so many, divided by ***; empty ones only before the first or after the last."""
    parts = [part.strip() for part in response.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


@_checks("length_constraints:nth_paragraph_first_word")
def _first_word(
    response: str, *, num_paragraphs: Amount, nth_paragraph: int, first_word: Text
) -> bool:
    """Exactly so many non-empty paragraphs, divided by empty lines; the nth starts with the word.

    The nth is counted among all of them, the empty ones too, as the reference does.
    """
    parts = [part.strip() for part in response.split("\n\n")]
    if not 1 <= nth_paragraph <= num_paragraphs == sum(map(bool, parts)):
        return False
    word = (parts[nth_paragraph - 1].split() or [""])[0].lstrip("'").lstrip('"')
    return re.split(r"""[.,?!'"]""", word)[0].lower() == first_word.lower()


# Content and format


@_checks("detectable_content:number_placeholders")
def _placeholders(response: str, *, num_placeholders: Amount) -> bool:
    """At least so many [square brackets], each on one line."""
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


@_checks("detectable_content:postscript")
def _postscript(response: str, *, postscript_marker: Text) -> bool:
    """The marker occurs anywhere, in any case; the two usual ones also with a space inside."""
    usual = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    marker = usual.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(marker, response.lower()) is not None


@_checks("detectable_format:constrained_response")
def _constrained(response: str) -> bool:
    return any(option in response for option in OPTIONS)


@_checks("detectable_format:json_format")
def _json(response: str) -> bool:
    """The whole response is JSON, perhaps in a markdown fence."""
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```"))
    except (ValueError, RecursionError):
        return False
    return True


@_checks("detectable_format:multiple_sections")
def _sections(response: str, *, section_spliter: Text, num_sections: Amount) -> bool:
    """At least so many markers, each followed by a number; the argument's name is published so."""
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", response)) >= num_sections


@_checks("detectable_format:number_bullet_lists")
def _bullets(response: str, *, num_bullets: Amount) -> bool:
    """Exactly so many lines that start with one * or with -."""
    stars = re.findall(r"^\s*\*[^*].*$", response, flags=re.MULTILINE)
    dashes = re.findall(r"^\s*-", response, flags=re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


@_checks("detectable_format:number_highlighted_sections")
def _highlights(response: str, *, num_highlights: Amount) -> bool:
    """At least so many *highlights*. The reference counts **bold** once, and ***both*** twice."""
    single = re.findall(r"\*([^\n*]*)\*", response)
    double = re.findall(r"\*\*([^\n*]*)\*\*", response)
    return sum(bool(text.strip()) for text in (*single, *double)) >= num_highlights


@_checks("detectable_format:title")
def _title(response: str) -> bool:
    """A <<title>> that is not empty, on one line."""
    titles = re.findall(r"<<[^\n]+>>", response)
    return any(title.lstrip("<").rstrip(">").strip() for title in titles)


@_checks("punctuation:no_comma")
def _no_comma(response: str) -> bool:
    return "," not in response


# Combination, start and end


@_checks("combination:two_responses")
def _two_responses(response: str) -> bool:
    """Two different texts, divided by ******; empty ones only at the outer ends."""
    parts = [part.strip() for part in response.split("******")]
    texts = [part for part in parts if part]
    return all(parts[1:-1]) and len(texts) == 2 and texts[0] != texts[1]


@_checks("combination:repeat_prompt")
def _repeat_prompt(response: str, *, prompt_to_repeat: Text) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.lower())


@_checks("startend:end_checker")
def _end(response: str, *, end_phrase: Text) -> bool:
    """In any case; closing double quotation marks do not count."""
    return response.strip().strip('"').lower().endswith(end_phrase.lower())


@_checks("startend:quotation")
def _quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


# What the checks measure with


def detected_language(text: str) -> str | None:
    """The text's language as an ISO 639-1 code ("zh-cn" and "zh-tw" for Chinese).

    None where nothing in the text shows a language, such as numbers alone.
    """
    from langdetect.lang_detect_exception import LangDetectException

    detector = _languages().create()
    detector.append(text)
    try:
        return str(detector.detect())
    except LangDetectException:
        return None


@cache
def _languages() -> Any:
    """langdetect's profiles in a fixed order, with a seed of our own.

    Its `detect` reads them in the folder's order and draws with a seed that is the process's: the
    same text may come out differently tomorrow.
    """
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    files = sorted(f for f in Path(PROFILES_DIRECTORY).iterdir() if f.name[0].isalpha())
    factory = DetectorFactory()
    factory.load_json_profile([file.read_text("utf-8") for file in files])
    factory.set_seed(0)
    return factory


@cache
def _punkt() -> Any:
    """The sentence splitter, with the English model that NLTK would have downloaded."""
    import punkt

    return punkt.tokenizer_for("english")


_BETWEEN_WORDS = re.compile(
    r"""\s | -- | \.{2,} | [:,](?!\d) | [;@#$%&?!*"`«»“”‘’„()\[\]{}<>] | [\u2012-\u2015]""",
    re.VERBOSE,
)
_INSIDE_WORDS = re.compile(
    r"""(?<=[^']) (?= (?: '[smd] | '(?:ll|re|ve) | n't ) $ )
    | \b can (?=not\b) | \b d (?='ye\b) | \b (?:gim|lem) (?=me\b) | \b gon (?=na\b)
    | \b got (?=ta\b) | \b more (?='n\b) | \b wan (?=na$)""",
    re.VERBOSE | re.IGNORECASE,
)


def capital_words(text: str) -> int:
    """How many words have capital letters only, as NLTK's `word_tokenize` divides words.

    A hyphenated word is one, a contraction two (IT 'S, CAN NOT), and a lone I counts.
    """
    pieces = (part for word in _BETWEEN_WORDS.split(text) for part in _split_inside(word))
    return sum(piece.isupper() for piece in pieces)


def _split_inside(word: str) -> Iterable[str]:
    cuts = [match.end() for match in _INSIDE_WORDS.finditer(word)]
    return (word[i:j] for i, j in zip([0, *cuts], [*cuts, len(word)], strict=True))
