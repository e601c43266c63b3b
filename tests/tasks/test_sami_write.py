"""The principle writer: what it says is checked, what is not taken has a reason, noise is keyed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from review_world import clustered_attempt
from scripted import Script, ScriptedSource, turns_of

from constitutions.constitution import Constitution, Principle, load, save
from constitutions.errors import UserError
from constitutions.reference import load_pairs
from models.engine.local import load_policy
from models.planted import world
from models.planted.oracle import behaviour_of
from models.policy import Completion, Message, Policy, PolicySettings, Progress, Request
from models.prompts import CHAT_CONSTITUTION, TERSE_CONSTITUTION
from tasks.record.record import Record
from tasks.record.slot import Slot
from tasks.rows import Rejected, prompt_id
from tasks.sami.write import (
    WriteSettings,
    Written,
    oppose,
    split_held_out,
    write_pairs,
    write_stage,
)

WORDS = ("kind", "brief", "honest", "funny", "calm", "precise", "formal", "warm", "bold", "modest")


@dataclass
class Writer(Script):
    """Words its n-th principle and antithesis as it is asked; it keeps the requests."""

    principle: Callable[[int], str | Completion] = lambda n: f"Be {WORDS[n]}."
    antithesis: Callable[[int, str], str | Completion] = lambda n, text: f"Never {text.lower()}"
    asked: list[Request] = field(default_factory=list)

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        self.asked += requests
        if progress:
            progress(len(requests))
        return [[self._answer(request)] for request in requests]

    def _answer(self, request: Request) -> Completion:
        *_, number, role = request.key.split("/")
        if role == "principle":
            said = self.principle(int(number))
        else:
            said = self.antithesis(int(number), turns_of(request)[1]["content"])
        return said if isinstance(said, Completion) else completion(said)

    def asked_for(self, role: str) -> list[Request]:
        return [r for r in self.asked if r.key.endswith(f"/{role}")]


def completion(text: str, finish: str = "stop") -> Completion:
    return Completion(text=text, tokens=5, logprob=-1.0, finish=finish)


def written(writer: Policy, **how: Any) -> Written:
    return write_pairs(writer, WriteSettings(**how), CHAT_CONSTITUTION, "7/1/write")


def pairs(found: Written) -> dict[str, str]:
    return {p.text: p.antithesis for p in found.constitution.principles}


def reasons(found: Written) -> dict[int | None, str]:
    return {row.sample: row.reason for row in found.rejected}


def test_each_principle_is_asked_for_its_antithesis_on_its_topic() -> None:
    writer = Writer(principle=lambda n: f"1. “Be {WORDS[n]}.”")
    ticks: list[int] = []
    settings = WriteSettings(principles=3, topics=("cooking", "law"), temperature=0.7, max_tokens=9)
    found = write_pairs(writer, settings, CHAT_CONSTITUTION, "7/1/write", ticks.append)
    assert pairs(found) == {
        "Be kind.": "Never be kind.",
        "Be brief.": "Never be brief.",
        "Be honest.": "Never be honest.",
    }
    assert not found.rejected
    assert sum(ticks) == len(writer.asked) == 6
    first, second, third, *opposed = writer.asked
    assert [("law" in turns_of(r)[0]["content"]) for r in (first, second, third)] == [0, 1, 0]
    assert [m["content"] for m in turns_of(opposed[1])[:2]] == [
        turns_of(second)[0]["content"],
        "Be brief.",
    ]
    assert {(r.temperature, r.max_tokens, r.n) for r in writer.asked} == {(0.7, 9, 1)}
    assert len({r.key for r in writer.asked}) == 6
    assert all(r.key.startswith("7/1/write/") for r in writer.asked)


@pytest.mark.parametrize(
    "said",
    [
        "Be kind.", "1. Be kind.", "- Be kind.", "(2) Be  kind.", '"Be kind."', "Principle: Be kind.",
        "**Be kind.**", "\n  Be kind.\n\n", "1) “Be kind.”", "Principle 3: 'Be kind.'",
    ],
)  # fmt: skip
def test_what_stands_around_a_principle_is_none_of_it(said: str) -> None:
    writer = Writer(principle=lambda n: said if n == 0 else "Be brief.")
    assert "Be kind." in pairs(written(writer, principles=2))


@pytest.mark.parametrize(
    "said", ["“Be kind” or “be fair”", "1.5 reasons are too few", "Don't say 'never'", "'Tis fine"]
)
def test_what_belongs_to_a_principle_stays(said: str) -> None:
    writer = Writer(principle=lambda n: said if n == 0 else "Be brief.")
    assert said in pairs(written(writer, principles=2))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (completion("Be kind", "length"), "not ended"),
        (completion("", "overflow"), "not given"),
        (completion("", "refused"), "not given"),
        ("", "empty"),
        ("1. “…”", "empty"),
        ("Be kind.\nBe fair.", "of several lines"),
        ("Be kind. " * 40, "too long"),
    ],
)
def test_what_is_no_sentence_is_rejected(said: str | Completion, reason: str) -> None:
    bad_principle = Writer(principle=lambda n: said if n == 1 else f"Be {WORDS[n]}.")
    found = written(bad_principle, principles=3)
    assert reasons(found) == {1: f"principle {reason}"}
    assert set(pairs(found)) == {"Be kind.", "Be honest.", "Be funny."}, "another one was asked for"
    assert len(bad_principle.asked_for("antithesis")) == 3, "not of what was rejected"
    bad_antithesis = Writer(antithesis=lambda n, text: said if n == 1 else f"Never {text}")
    found = written(bad_antithesis, principles=3)
    assert reasons(found) == {1: f"antithesis {reason}"}
    assert "“Be brief.”" in found.rejected[0].detail


def test_the_same_principle_again_is_rejected() -> None:
    said = ("Be kind to every reader.", "be KIND to every reader", "To every reader be kind!")
    found = written(Writer(principle=lambda n: (*said, "Be brief.")[n]), principles=2)
    assert set(pairs(found)) == {said[0], "Be brief."}
    assert reasons(found) == {1: "principle repeated", 2: "principle repeated"}
    assert said[0] in found.rejected[0].detail


def test_how_alike_two_principles_may_be_is_a_setting() -> None:
    def say(n: int) -> str:
        return ("Be kind to every reader.", "Be kind to every leader.", "Be brief.")[n]

    assert len(pairs(written(Writer(principle=say), principles=2, similar=0.99))) == 2
    strict = written(Writer(principle=say), principles=2, similar=0.9)
    assert reasons(strict) == {1: "principle repeated"}


def test_a_repeated_principle_stands_in_where_the_first_has_no_antithesis() -> None:
    writer = Writer(
        principle=lambda n: ("Be kind.", "Be kind!", "Be brief.")[n],
        antithesis=lambda n, text: "" if n == 0 else f"Never {text}",
    )
    found = written(writer, principles=2)
    assert set(pairs(found)) == {"Be kind!", "Be brief."}
    assert reasons(found) == {0: "antithesis empty"}


def test_an_antithesis_opposes_its_own_principle_only() -> None:
    said = {0: "be kind", 2: "Be blunt.", 3: "Be brief!", 4: "Be blunt."}
    writer = Writer(antithesis=lambda n, text: said.get(n, f"Never {text}"))
    found = written(writer, principles=4)
    assert reasons(found) == {
        0: "antithesis is the principle itself",
        3: "antithesis is another principle",
        4: "antithesis repeated",
    }
    inverse = Writer(principle=lambda n: ("Be kind.", "Never be kind.", "Be brief.")[n])
    assert reasons(written(inverse, principles=2)) == {1: "principle is an antithesis"}


def test_a_short_negation_is_not_taken_for_its_principle() -> None:
    text = "adopt the role of trained privacy staff"  # 93 % alike
    writer = Writer(principle=lambda n: (text, "Be brief.")[n])
    assert pairs(written(writer, principles=2))[text] == f"Never {text}"


def test_what_is_written_loads(tmp_path: Path) -> None:
    found = written(Writer(), principles=10)
    save(found.constitution, tmp_path / "pairs.yaml")
    assert load(tmp_path / "pairs.yaml") == found.constitution


def test_a_writer_is_asked_so_often_and_no_more() -> None:
    writer = Writer(principle=lambda n: f"Be {WORDS[n % 3]}.")
    found = written(writer, principles=5, attempts=2)
    assert len(pairs(found)) == 3
    assert len(writer.asked_for("principle")) == 10 == 3 + len(found.rejected)


def test_a_writer_of_one_principle_is_refused_with_the_commonest_reason() -> None:
    writer = Writer(principle=lambda n: ("Be kind.", "", "Be kind!", "Be kind?", "be kind")[n])
    with pytest.raises(UserError) as caught:
        written(writer, principles=2, attempts=2)
    said = str(caught.value)
    assert "the writer worded 1 principle with an antithesis" in said
    assert "most often (2 of 3): principle repeated, as in “Be kind!”" in said


def test_a_rejected_principle_says_what_was_asked() -> None:
    found = written(Writer(principle=lambda n: ("", "Be kind.", "Be brief.")[n]), principles=2)
    (row,) = found.rejected
    asked: Message = {
        "role": "user",
        "content": CHAT_CONSTITUTION.write.format(topic="answering a user's request"),
    }
    assert row.prompt_id == prompt_id((asked,))
    assert row.source == "topic: answering a user's request"


# Discovered constitutions

FOUND = Constitution(
    experiment="e",
    iteration=2,
    principles=(
        Principle(text="be kind", support=9, share=0.6, members=("be kind", "be nice")),
        Principle(text="be brief", antithesis="ramble", support=4, share=0.3),
        Principle(text="be funny", support=1, share=0.1),
    ),
)


def opposing(say: Callable[[str, int], str]) -> Script:
    """Words the antithesis of a text in its n-th try."""
    tries: Counter[str] = Counter()

    def answer(messages: Sequence[Message]) -> str:
        text = messages[1]["content"]
        tries[text] += 1
        return say(text, tries[text])

    return Script(answer)


def opposed(writer: Script, constitution: Constitution = FOUND, **how: Any) -> Written:
    return oppose(writer, constitution, WriteSettings(**how), CHAT_CONSTITUTION, "0/0/write")


def test_only_what_lacks_an_antithesis_gets_one() -> None:
    writer = opposing(lambda text, n: f"Never {text}.")
    found = opposed(writer)
    assert pairs(found) == {
        "be kind": "Never be kind.",
        "be brief": "ramble",
        "be funny": "Never be funny.",
    }
    assert not found.rejected
    assert len(writer.asked) == 2
    bare = [p.model_copy(update={"antithesis": ""}) for p in found.constitution.principles]
    before = [p.model_copy(update={"antithesis": ""}) for p in FOUND.principles]
    assert bare == before, "everything else is as it was"


def test_an_antithesis_is_asked_for_again_with_other_noise() -> None:
    writer = opposing(lambda text, n: text if n < 3 else f"Never {text}")
    assert len(pairs(opposed(writer, attempts=3))) == 3
    assert len({r.key for r in writer.asked}) == 6
    short = opposed(opposing(lambda text, n: text if "kind" in text else f"Not {text}"), attempts=2)
    assert set(pairs(short)) == {"be brief", "be funny"}
    (row,) = short.rejected
    assert (row.reason, row.sample) == ("antithesis is the principle itself", 0)
    assert "“be kind”" in row.detail


@pytest.mark.parametrize("said", ["be brief", "Be brief.", "ramble"])
def test_the_wording_of_another_principle_opposes_none(said: str) -> None:
    found = opposed(opposing(lambda text, n: said if "kind" in text else f"Never {text}"))
    assert set(pairs(found)) == {"be brief", "be funny"}


def test_a_constitution_without_enough_pairs_is_refused() -> None:
    with pytest.raises(UserError, match=r"worded 1 principle with .*: antithesis empty, as in “be"):
        opposed(opposing(lambda text, n: ""))
    with pytest.raises(UserError, match="worded 0 principles"):
        opposed(opposing(lambda text, n: "x"), Constitution(principles=()))
    alone = Constitution(principles=(Principle(text="be kind"),))
    assert pairs(opposed(opposing(lambda text, n: "be rude"), alone)) == {"be kind": "be rude"}


# Held-out principles


def test_the_seed_chooses_what_is_held_out() -> None:
    constitution = load_pairs("planted")
    ids = [p.id for p in constitution.principles]
    trained, held = split_held_out(constitution, 0.25, 0)
    assert len(held) == 6
    assert [i for i in ids if i in held] == list(held)
    assert [i for i in ids if i not in held] == list(trained)
    assert split_held_out(constitution, 0.25, 0) == (trained, held)
    assert split_held_out(constitution, 0.25, 1) != (trained, held)
    more = split_held_out(constitution, 0.5, 0)[1]
    assert set(held) < set(more), "a larger share holds out the same and more"


@pytest.mark.parametrize(("share", "held"), [(0.0, 0), (0.01, 1), (0.5, 12), (0.999, 23)])
def test_at_least_one_principle_is_trained_on(share: float, held: int) -> None:
    trained, others = split_held_out(load_pairs("planted"), share, 3)
    assert (len(trained), len(others)) == (24 - held, held)
    alone = Constitution(principles=(Principle(text="be kind"),))
    assert split_held_out(alone, share, 0)[1] == ()


# The stage


class Unloadable(Script):
    """A writer that nobody may ask."""

    def __init__(self) -> None:
        super().__init__(lambda _: "")

    def generate(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> list[list[Completion]]:
        raise AssertionError("there is nothing to word")


@pytest.fixture
def at(workplace: Path) -> Slot:
    return Slot(Record("amplified", workplace / ".staple"), 0, seed=0)


def source(script: Policy, digest: str = "digest", **how: Any) -> ScriptedSource:
    return ScriptedSource(PolicySettings(**how), "nowhere", digest, script=script)


def test_the_stage_writes_the_pairs_and_what_is_held_out(at: Slot) -> None:
    settings = WriteSettings(principles=4, held_out=0.5)
    writer = Writer(principle=lambda n: ("", *WORDS)[n])
    done = write_stage(at, settings, source(writer))
    constitution = load(done.path("constitution.yaml"))
    assert (constitution.experiment, len(constitution.principles)) == ("amplified", 4)
    held = json.loads(done.path("held_out.json").read_text("utf-8"))
    assert tuple(held) == split_held_out(constitution, 0.5, 0)[1]
    assert [row.reason for row in done.read("rejected", Rejected)] == ["principle empty"]
    counts = {name: value for name, value in done.metrics.items() if name.startswith("write/")}
    assert counts == {"write/principles": 4, "write/held_out": 2, "write/rejected": 1}
    assert {r.key.rsplit("/", 2)[0] for r in writer.asked} == {"0/0/write"}
    assert write_stage(at, settings, source(Unloadable())).reused
    for changed in (source(Writer(), "other"), source(Writer(), templates="terse")):
        assert not write_stage(at, settings, changed).reused
    assert not write_stage(replace(at, seed=1), settings, source(Writer())).reused


def test_a_given_constitution_is_read_and_its_file_is_watched(at: Slot) -> None:
    path = Path("pairs.yaml")
    save(Constitution(principles=(Principle(text="be kind", antithesis="be rude"),)), path)
    settings = WriteSettings(constitution=str(path), held_out=0.5)
    done = write_stage(at, settings, source(Unloadable()))
    found = load(done.path("constitution.yaml"))
    assert [(p.text, p.antithesis) for p in found.principles] == [("be kind", "be rude")]
    assert done.metrics["write/held_out"] == 0
    assert write_stage(at, settings, source(Unloadable(), "another writer")).reused
    path.write_text(path.read_text("utf-8").replace("be rude", "be cold"))
    again = write_stage(at, settings, source(Unloadable()))
    assert not again.reused
    assert load(again.path("constitution.yaml")).principles[0].antithesis == "be cold"


def test_shipped_and_missing_constitutions(at: Slot) -> None:
    done = write_stage(at, WriteSettings(constitution="planted"), source(Unloadable()))
    assert done.metrics["write/principles"] == 24
    with pytest.raises(UserError, match="no such constitution"):
        write_stage(at, WriteSettings(constitution="plantd"), source(Unloadable()))


def test_a_discovered_constitution_becomes_pairs(at: Slot) -> None:
    discovered = clustered_attempt(Slot(Record("discovery", at.record.home), 1, seed=0))
    writer = opposing(lambda text, n: f"Never {text}.")
    done = write_stage(at, WriteSettings(), source(writer), discovered)
    before = load(discovered.path("constitution.yaml"))
    after = load(done.path("constitution.yaml"))
    assert {p.text: (p.support, p.members) for p in after.principles} == {
        p.text: (p.support, p.members) for p in before.principles
    }
    assert all(p.antithesis == f"Never {p.text}." for p in after.principles)
    assert done.inputs["discovered"].digest == discovered.digest
    both = WriteSettings(constitution="planted")
    with pytest.raises(UserError, match="two constitutions are given"):
        write_stage(at, both, source(writer), discovered)


# A real writer


@pytest.fixture(scope="module")
def real_writer(planted_writer: Path) -> Policy:
    directory = next(planted_writer.glob("planted-*"))
    settings = PolicySettings(
        model=str(directory), dtype="float32", device="cpu", threads=1, quantization="none"
    )
    return load_policy(settings, directory, None)


def test_a_planted_model_writes_a_constitution(real_writer: Policy) -> None:
    settings = WriteSettings(topics=world.OBJECTS, principles=12)
    found = write_pairs(real_writer, settings, TERSE_CONSTITUTION, "0/0/write")
    again = write_pairs(real_writer, settings, TERSE_CONSTITUTION, "0/0/write")
    other = write_pairs(real_writer, settings, TERSE_CONSTITUTION, "1/0/write")
    assert found == again
    assert found.constitution != other.constitution, "the key seeds the noise"
    principles = found.constitution.principles
    assert len(principles) == 12
    assert sum(behaviour_of(p.text) is not None for p in principles) >= 9
    negated = [p for p in principles if p.antithesis.startswith(f"{world.NEVER} ")]
    assert len(negated) >= 9
