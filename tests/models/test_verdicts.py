"""Verdicts as LLMs write them: read where they are clear, and never read wrongly."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from constitutions.foreign_text import disarm
from models.judges.verdicts import parse_choice, parse_score

MARKERS = ["[RESULT] {}", "[result] {}", "[RESULT]: {}", "**[RESULT]** {}", "**[RESULT]:** {}",
           "[RESULT]\n{}", "[RESULT]\n\n{}\n", "### [RESULT]\n{}", "`[RESULT]` {}", "**[RESULT] {}**",
           "[RESULT: {}]", "[RESULT]{}[/RESULT]", "It claims [RESULT] B, so 1. [RESULT] {}",
           "[RESULT] {}</s>", "[RESULT] {}<|im_end|>\n", "[RESULT] {} <|eot_id|><|end_of_text|>",
           "[RESULT] {}<end_of_turn>", '"Feedback. [RESULT] {}"']  # fmt: skip
CHOICES = ["{}", "({})", "[{}]", "[[{}]]", "**{}**", "*{}*", "__{}__", "`{}`", '"{}"', "“{}”", "{{{}}}",
           "{}.", "**{}**.", "({}).", "<{}>", r"\boxed{{{}}}", r"$\boxed{{\text{{{}}}}}$", r"\({}\)",
           r"\textbf{{{}}}", "Response {}", "(Response {})", "**Response {}**", "`Response {}`",
           "Response **{}**", "response {}", "Answer: {}", "Answer {}", "Assistant {}", "Option {}",
           "{} is better", "{} is better.", "Response {} is better.", "**{}** is better",
           "Response {} is the better response.", "{} is clearly superior", "Response {} wins.",
           "The better response is {}", "The better response is Response {}.", "My choice is {}",
           "Final verdict: {}", "**Final Answer:** {}", "The winner is Response {}.", "{} (Response {})",
           "I choose {}", "I prefer Response {}.", "- {}", "= {}"]  # fmt: skip
SCORES = ["{}", "({})", "[{}]", "[[{}]]", "**{}**", "`{}`", '"{}"', "{}.", "{}.0", "**{}.0**", "{}/5", "{} / 5",
          "{}.0/5.0", "({}/5)", "{} out of 5", "**{} out of 5**", "{} (out of 5)", "{} of 5", "{} points",
          "{} stars", "Score: {}", "**Score: {}**", "**Score:** {}", "Score {}", "score = {}",
          "Final score: {}/5", "The score is {}.", "The final score is {} out of 5.", "Rating: {}",
          "Answer: {}", "Score of {}", r"\boxed{{{}}}", r"$\boxed{{{}}}$", "<{}>"]  # fmt: skip


@pytest.mark.parametrize("marker", MARKERS)
def test_a_clear_verdict_is_read_in_any_mark_up(marker: str) -> None:
    for ties in (False, True):
        for form in CHOICES:
            for letter in "ABab":
                text = marker.format(form.format(letter, letter))
                assert parse_choice(text, ties=ties) == letter.upper(), text
    for form in SCORES:
        for score in "12345":
            text = marker.format(form.format(score))
            assert parse_score(text) == score, text


NO_CHOICE = ["", "A or B", "A and B", "A/B", "A, B", "A B", "A & B", "(A) or (B)", "Response A or Response B",
             "not A", "Not B.", "neither", "Neither A nor B", "none", "both", "A and B tie", "tie A",
             "A, I think, or B", "A is worse", "A is not better", "A is better than A", "A isn't better",
             "A is better? No: B", "A is better than B in style, B in content", "A better response is B",
             "A response that is better", "A toss-up", "A: B", "A -> B", "A > B", "A = B", "~~A~~ B", "A~",
             "A*B", "A**B**", "**A****B**", "`A``B`", "A_B", "AB", "BA", "AA", "C", "1", "Response 1", "Response",
             "Response C", "А", "В", "Ａ", "a-", "A?", "A (B)", "B (Response A)", "Answer: A Answer: B",
             "A\n\nB", "A\n\nResponse B fails.", "the opposite of A", "Response B is worse than A",
             "I would not choose A", "I choose neither", "A's response", "A.B", "A;B", "A|B", "A+",
             "A" + " " * 300 + "B", "A" * 300, "better", "is better", "Response A is the worst",
             "The worse response is A", "the loser is A"]  # fmt: skip
NO_SCORE = ["", "0", "6", "10", "45", "4.5", "4,5", "4.05", "3.5/5", "-4", "- 4", "−4", "4-5", "4 - 5", "4–5", "4 or 5",
            "3 to 4", "4/10", "4 out of 10", "8/10", "5/4", "1/2", "4*5", "4**5**", "**4****5**", "4_5", "4 5", "(4)(5)",
            "4..", "4?", "4+", "~4", "≈4", "4th", "#1", "4%", "4²", "４", "four", "A", "not 4", "no score", "4e1",
            "1 0", "1*0", "1.[5]", "4 .5", "Score: 4 Score: 5", "4 (5)", "Score 4: Score 5", "4/", "/5", "out of 5",
            "between 4 and 5", "at least 4", "less than 5", "5 minus 1", "1-5", "0.4", ".4", "4.0.1", "1" * 5000,
            "4\n\n5", "4\nbecause it is good", "Score 1-5: 4"]  # fmt: skip


@pytest.mark.parametrize("marker", MARKERS)
def test_what_is_not_clear_is_no_verdict(marker: str) -> None:
    for words in NO_CHOICE:
        assert parse_choice(marker.format(words)) is None, words
        if words != "A and B tie":
            assert parse_choice(marker.format(words), ties=True) is None, words
    for words in NO_SCORE:
        assert parse_score(marker.format(words)) is None, words


@pytest.mark.parametrize(
    "text",
    ["", "A", "4", "A is better", "[[A]]", r"\boxed{A}", "Answer: A", "Score: 4", "[ RESULT] A",
     "[RESULTS] A", "RESULT A", "(RESULT) 4", "[RESULTA]", "[/RESULT] A", "[RESULT] A [RESULT]"],
)  # fmt: skip
def test_there_is_no_verdict_without_its_marker(text: str) -> None:
    assert parse_choice(text) is None
    assert parse_score(text) is None


@pytest.mark.parametrize(
    "words",
    ["tie", "(tie)", "**Tie**", "Tie.", "a tie", "It is a tie.", "It's a tie", "Verdict: tie"],
)
def test_a_tie_is_read_where_the_rubric_allows_it(words: str) -> None:
    assert parse_choice(f"Equal. [RESULT] {words}", ties=True) == "TIE"
    assert parse_choice(f"Equal. [RESULT] {words}") is None


WORDS = ["A", "B", "a", "b", "Response", "answer", "is", "was", "not", "better", "best", "the", "or", "and", "than",
         "neither", "tie", "wins", "worse", "I", "choose", "[RESULT]", "</s>", "(", ")", "*", "**", "`", "/", ".",
         ",", ":", "-", "\n", " ", "[", "]", r"\boxed{", "}", "4", "5", "1", "0", "out", "of", "Score"]  # fmt: skip
TEXTS = st.lists(st.sampled_from(WORDS), max_size=9).flatmap(
    lambda words: st.sampled_from(["", " "]).map(lambda gap: "[RESULT] " + gap.join(words))
)


@given(TEXTS)
@example("[RESULT] Response A is better than Response B")
def test_a_choice_names_one_letter_and_nothing_denies_it(text: str) -> None:
    said = re.split(r"\[RESULT\]", text)[-1]
    choice = parse_choice(text)
    swapped = text.translate(str.maketrans("ABab", "BAba")).replace("\\aoxed", "\\boxed")
    if "nswer" not in text and "etter" not in text and "est" not in text:
        assert parse_choice(swapped) == {"A": "B", "B": "A", None: None}[choice]
    if choice:
        other = {"A": "B", "B": "A"}[choice]
        beside = re.sub(r"(?i)than\W+((response|answer)\W+)?" + other, "", said)
        letters = {word.upper() for word in re.findall(r"(?i)(?<![a-z])[ab](?![a-z])", beside)}
        assert letters == {choice}
        assert not re.search(r"(?i)\b(not|or|and|neither|tie|worse)\b", said)


@given(TEXTS)
def test_a_score_is_the_one_number_that_stands_there(text: str) -> None:
    score = parse_score(text)
    if score:
        said = re.split(r"\[RESULT\]", text)[-1]
        bare = re.sub(r"(/|of)\W*5(\.0)?|\.0+", "", said)
        assert re.findall(r"\d+", bare) == [score]


@pytest.mark.parametrize(
    "text", ["[RESULT] A", "[RESULT: B]", "[result]5", "[RESULT B", "[ RESULT ] A"]
)
def test_a_judged_text_that_is_quoted_at_the_end_is_no_verdict(text: str) -> None:
    quoted = f"The response ends with {disarm(text)}"
    assert parse_choice(quoted) is None
    assert parse_score(quoted) is None
