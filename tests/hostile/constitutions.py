"""Hostile constitutions: YAML as people edit it, JSON of SAMI's reference code, response files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile.cases import Case, Content, fifo, folder, laughs, sparse

P = "principles:\n"
YAML: dict[str, Content] = {
    "empty": "",
    "a word": "hello",
    "a list": "- text: a\n",
    "principles as a word": "principles: hello\n",
    "principles as a number": "principles: 5\n",
    "principles as a mapping": "principles: {a: b}\n",
    "no principles": "experiment: a\n",
    "laughs": laughs(),
    "laughs as principles": laughs() + "principles: *j\n",
    "laughs as a text": laughs() + P + "- text: *j\n",
    "laughs as members": laughs() + P + "- {text: a, members: *j}\n",
    "of itself": "principles: &a\n- *a\n",
    "a text of itself": "&a\nprinciples:\n- text: *a\n",
    "deep": "principles: " + "[" * 5_000,
    "deeper": "principles: " + "[" * 500_000,
    "a 13th month": P + "- text: 2024-13-45\n",
    "a date": P + "- text: 2024-01-01\n",
    "5,000 digits": P + "- text: " + "9" * 5_000 + "\n",
    "5,000 digits of support": P + "- text: a\n  support: " + "9" * 5_000 + "\n",
    "a tag": P + "- text: !!python/object/apply:os.system ['x']\n",
    "binary": P + "- text: !!binary xx\n",
    "no int": P + "- text: !!int abc\n",
    "nothing": P + "-\n",
    "a string": P + "- hello\n",
    "a NUL": P + '- text: "a\\0b"\n',
    "half a character": P + '- text: "\\ud800"\n',
    "a list as key": P + "- ? [a]\n  : b\n",
    "a mapping as key": P + "- ? {a: b}\n  : b\n",
    "200,000 nothings": "principles: [" + "~, " * 200_000 + "]",
    "100,000 empty ones": "principles: [" + "{}, " * 100_000 + "]",
    "900 wrong keys each": P + ("- {" + ", ".join(f"k{n}: 1" for n in range(900)) + "}\n") * 100,
    "30,000 keys": P + "- {text: a, " + ", ".join(f"k{n}: 1" for n in range(30_000)) + "}\n",
    "5,000 times the same": P + "- text: a\n" * 5_000,
    "a merge of a number": P + "- <<: 3\n  text: a\n",
    "a merge of itself": P + "- &a\n  <<: *a\n  text: a\n",
    "no number as support": P + "- {text: a, support: .nan}\n",
    "an endless share": P + "- {text: a, share: .inf}\n",
    "negative support": P + "- {text: a, support: -5}\n",
    "a bare escape": (P + "- text: a\x1b[31mb\n").encode(),
    "an unknown red key": P + '- {text: a, "\\e[31mred": 1}\n',
    "a red id twice": P + '- {id: "\\e[31ma", text: b}\n- {id: "\\e[31ma", text: c}\n',
    "blanks": P + '- text: "   "\n',
    "an iteration below": "iteration: -1\n" + P + "- text: a\n",
    "an experiment of markup": "experiment: [/green]\n" + P + "- text: a\n",
    "80 MB": P + "- text: " + "a" * (80 << 20) + "\n",
    "a sparse gigabyte": sparse(1 << 30, P.encode()),
    "a FIFO": fifo,
    "a folder": folder,
    "UTF-16": (P + "- text: a\n").encode("utf-16"),
    "two documents": P + "- text: a\n---\n" + P + "- text: b\n",
}


def reference(**change: Any) -> str:
    good = {
        "positive": "1. Be brief.\n2. Be kind.",
        "negative": "1. Be long.\n2. Be rude.",
        "identifiers": {"positive": ["pos a", "pos b"], "negative": ["neg a", "neg b"]},
    }
    return json.dumps(good | change)


JSON: dict[str, Content] = {
    "empty": "",
    "a number": "5",
    "a list": "[1, 2]",
    "cut": '{"positive": "1. a',
    "deep": "[" * 100_000,
    "80 levels": "[" * 80 + "]" * 80,
    "3 million ones": "[" + "1," * 3_000_000 + "1]",
    "3 million empty objects": "[" + "{}," * 3_000_000 + "1]",
    "no number": '{"positive": NaN, "negative": "", "identifiers": {}}',
    "endless": '{"positive": 1e999}',
    "5,000 digits": '{"positive": ' + "9" * 5_000 + "}",
    "a key twice": '{"positive": "1. a", "positive": "1. b"}',
    "other fields": '{"\\u001b[31mred": 1}',
    "60,000 other fields": json.dumps({f"k{n}": 1 for n in range(60_000)}),
    "no texts": reference(positive=5, negative=None),
    "no numbers": reference(positive="Be brief."),
    "10,000 digits before the dot": reference(positive="9" * 10_000 + ". a"),
    "numbers twice": reference(positive="1. a\n1. b"),
    "odd names": reference(identifiers={"positive": [1, None], "negative": ["\x1b[31m", "neg b"]}),
    "names as a word": reference(identifiers="pos a"),
    "more names": reference(identifiers={"positive": ["pos a"] * 50_000, "negative": ["neg a"]}),
    "half a character": reference(positive="1. \ud800\n2. Be kind."),
    "half a character in a name": reference(
        identifiers={"positive": ["pos \ud800", "pos b"], "negative": ["neg a", "neg b"]}
    ),
    "latin-1": '{"positive": "caf\xe9"}'.encode("latin-1"),
    "a sparse terabyte": sparse(1 << 40),
}
RESPONSES: dict[str, Content] = {
    "no columns": "{}",
    "a red column": '{"\\u001b[31mred": {}}',
    "columns as lists": '{"constitution": [], "question": [], "response": []}',
    "3 million keys": '{"constitution": {' + ",".join(f'"{n}":0' for n in range(2_100_000)) + "}}",
    "a red key": '{"constitution": {"\\u001b[31m": 1}, "question": {}, "response": {}}',
    "no texts": '{"constitution": {"a": 1}, "question": {"a": []}, "response": {"a": null}}',
    "other keys": '{"constitution": {"a": "b"}, "question": {"b": "c"}, "response": {"c": "d"}}',
    "a key twice": '{"constitution": {"a": "b", "a": "c"}}',
}
JUDGED = ("judge", "r.json", "r.json", "--set", "judge.kind=pairwise")


def reading(name: str) -> Callable[[], Any]:
    def read() -> Any:
        from constitutions.constitution import load_draft
        from constitutions.reference import load_pairs

        return (load_pairs if name.endswith(".json") else load_draft)(Path(name))

    return read


def cases() -> Iterator[Case]:
    for what, content in YAML.items():
        made = {"c.yaml": content}
        yield Case(f"constitution: {what}", call=reading("c.yaml"), files=made)
    for what, content in JSON.items():
        made = {"c.json": content}
        yield Case(f"reference: {what}", call=reading("c.json"), files=made)
    for what, content in RESPONSES.items():
        yield Case(f"responses: {what}", JUDGED, files={"r.json": content})
    fine = P + '- text: "\\e[31mred"\n- {text: b, antithesis: c}\n'
    yield Case("constitution: red", call=reading("c.yaml"), files={"c.yaml": fine}, code=0)
    many = P + "".join(f"- text: principle {n}\n" for n in range(5_000))
    yield Case("constitution: 5,000", call=reading("c.yaml"), files={"c.yaml": many}, code=0)
    used = ("validate", "planted-sami", "--set", "write.constitution=c.yaml")
    yield Case("constitution: of an experiment", used, files={"c.yaml": laughs()})


CASES = list(cases())
