"""Where SAMI's constitutions come from: shipped files, YAML, and the reference's JSON as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from constitutions.constitution import Constitution, Principle, load, save
from constitutions.errors import UserError
from constitutions.reference import files_of, load_pairs, shipped
from models.planted.oracle import behaviour_of
from models.planted.world import BEHAVIOURS, antithesis

BRIEF, LONG = "Summaries should be brief.", "Summaries should be long. "
FULL, THIN = "Summaries should be thorough.", "Summaries should be thin."


def _document(**changes: Any) -> dict[str, Any]:
    return {
        "positive": f"1. {BRIEF} \n2. {FULL}",
        "negative": f"1. {LONG} \n2. {FULL}",
        "identifiers": {
            "positive": ["pos concise", "pos comprehensive"],
            "negative": ["neg concise", "pos comprehensive"],
        },
    } | changes


def _write(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def _pairs(constitution: Constitution) -> dict[str, tuple[str, str]]:
    return {p.id: (p.text, p.antithesis) for p in constitution.principles}


def _refused(source: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_pairs(source)
    return str(caught.value)


@pytest.mark.parametrize("writer", ["mistral", "opus"])
def test_the_published_constitutions_are_read_as_they_are(
    sami_reference: Path, writer: str
) -> None:
    folder = sami_reference / f"constitutions_{writer}"
    assert len(files_of(folder)) == 6
    pairs = _pairs(load_pairs(folder))
    assert set(pairs) == {"concise", "comprehensive"}
    for text, opposite in pairs.values():
        assert text.startswith("Summaries should be ") and text.endswith(".")
        assert opposite.startswith("Summaries should be ") and opposite != text
    assert "brief" in pairs["concise"][0] and "lengthy" in pairs["concise"][1]
    for path in files_of(folder):
        own, said = _pairs(load_pairs(path)), path.read_text("utf-8")
        assert own.keys() == pairs.keys()
        for name, (text, opposite) in own.items():
            assert text == pairs[name][0]
            assert opposite == (pairs[name][1] if f'"neg {name}"' in said else "")


def test_files_of_a_folder_complete_one_another(tmp_path: Path) -> None:
    one = _write(tmp_path / "0.json", _document())
    assert _pairs(load_pairs(one)) == {
        "concise": (BRIEF, LONG.strip()),
        "comprehensive": (FULL, ""),
    }
    _write(
        tmp_path / "1.json",
        _document(
            negative=f" 1. {BRIEF}\r\n\n 2. Summaries should\n   be thin.",
            identifiers={
                "positive": ["pos concise", "pos comprehensive"],
                "negative": ["pos concise", "neg comprehensive"],
            },
        ),
    )
    assert _pairs(load_pairs(tmp_path))["comprehensive"] == (FULL, THIN)


def test_an_item_may_hold_numbers(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "0.json",
        _document(positive="1. Give 1.5 reasons, e.g. 2. or so.\n2. Be brief."),
    )
    document = json.loads(path.read_text("utf-8"))
    document["negative"], document["identifiers"]["negative"] = "1. Ramble.", ["neg concise"]
    _write(path, document)
    assert _pairs(load_pairs(path))["concise"] == ("Give 1.5 reasons, e.g. 2. or so.", "Ramble.")


NAMES = {"positive": ["pos a", "pos b"], "negative": ["neg a"]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"positive": 3}, "field 'positive': this is not a text; expected principles as one text"),
        ({"negative": " "}, "field 'negative': this is not a text"),
        ({"positive": "Be brief.\nBe full."}, "field 'positive': its items are not numbered from 1"),
        ({"positive": "1. Be brief.\n3. Be full."}, "its items are not numbered from 1 on"),
        ({"positive": "1. Be brief.\n2. "}, "field 'positive': item 2 is empty"),
        ({"positive": "1. Be brief."}, "there are 1 numbered items and 2 identifiers"),
        ({"positive": "1. \ud800\n2. b"}, "item 1 holds half a character"),
        ({"identifiers": []}, "field 'identifiers.positive': this is not a list"),
        ({"identifiers": {"positive": ["pos a", "b"], "negative": ["neg a"]}}, "'b' is no identifier; expected 'pos NAME'"),
        ({"identifiers": {"positive": ["pos a", 7], "negative": ["neg a"]}}, "7 is no identifier"),
        ({"identifiers": {"positive": ["pos a", "pos a"], "negative": ["neg a"]}}, "'pos a' is there twice"),
        ({"identifiers": NAMES, "negative": "1. x\n2. y"}, "there are 2 numbered items and 1 identifiers"),
        ({"identifiers": {**NAMES, "negative": ["neg a", "neg c"]}}, "the antithesis of 'c' has no principle"),
        ({"identifiers": {**NAMES, "negative": ["pos a", "neg b"]}}, "the text of 'a' differs from that in"),
        ({"identifiers": NAMES, "negative": f"1. {FULL}"}, "'a', antithesis: the same as the text of principle 2"),
        ({"more": 1}, "it has the fields positive, negative, identifiers, more"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named_with_its_field(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = _write(tmp_path / "hostile.json", _document(**changes))
    message = _refused(path)
    assert "hostile.json" in message
    assert said in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"caf\xe9", "byte 3: the text is not UTF-8"),
        (b"", "this is not JSON"),
        (b"{'positive': 1}", "this is not JSON"),
        (b"[" * 100_000, "this is not JSON"),
        (b"9" * 5_000, "this is not JSON"),
        (b"[1]", "it has no object"),
        (b"{}", "it has the fields none"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert said in _refused(path)


def test_all_mistakes_of_a_folder_are_named_at_once(tmp_path: Path) -> None:
    _write(tmp_path / "0.json", _document())
    _write(tmp_path / "1.json", _document(positive=3, negative=4))
    _write(tmp_path / "2.json", _document(positive=f"1. Be terse.\n2. {FULL}"))
    (tmp_path / "3.json").write_bytes(b"\xff")
    message = _refused(tmp_path)
    assert "1.json, field 'positive'" in message and "1.json, field 'negative'" in message
    assert "2.json, 'positive': the text of 'concise' differs from that in" in message
    assert "3.json, byte 0" in message


def test_a_yaml_file_is_a_source_too(tmp_path: Path) -> None:
    pairs = Constitution(principles=(Principle(text="be kind", antithesis="be rude"),))
    save(pairs, tmp_path / "pairs.yaml")
    assert load_pairs(tmp_path / "pairs.yaml") == pairs
    (tmp_path / "none.yaml").write_text("principles: []\n")
    assert "there is no principle" in _refused(tmp_path / "none.yaml")


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such constitution; expected one of planted, summaries"):
        load_pairs("plantd")
    assert "there is no JSON file in it" in _refused(tmp_path)
    (tmp_path / "pairs.txt").write_text("principles: []\n")
    assert "neither YAML nor JSON" in _refused(tmp_path / "pairs.txt")


def test_the_shipped_planted_constitution_names_every_behaviour() -> None:
    constitution = load_pairs("planted")
    assert {p.id: behaviour_of(p.text) for p in constitution.principles} == {
        name: name for name in BEHAVIOURS
    }
    for principle in constitution.principles:
        assert principle.antithesis == antithesis(principle.text)


def test_the_shipped_constitution_for_summaries_has_antitheses() -> None:
    constitution = load_pairs("summaries")
    assert 4 <= len(constitution.principles) <= 6
    assert all(p.antithesis for p in constitution.principles)


def test_every_shipped_constitution_loads() -> None:
    assert {"planted", "summaries"} <= set(shipped())
    for name, path in shipped().items():
        assert load_pairs(name) == load(path)
