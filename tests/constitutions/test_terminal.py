"""What others wrote is shown as text: no terminal controls, no markup, no passwords."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from constitutions.errors import UserError, UserErrors
from constitutions.terminal import Clean, clean_logs
from constitutions.untrusted import clean, hide_passwords

HOSTILE = "a\x1b[31mb\x9b2J\u202ec[/green]\x07:smile:"
SHOWN = "a[31mb2Jc[/green]:smile:"


def printed(thing: object, width: int = 80) -> str:
    file = io.StringIO()
    console = Clean(file=file, force_terminal=True, color_system="truecolor", width=width)
    console.print(thing, highlight=False)
    return file.getvalue()


@pytest.mark.parametrize("where", ["string", "text", "title", "head", "cell", "panel"])
def test_controls_and_markup_are_text_wherever_they_stand(where: str) -> None:
    table = Table(title=HOSTILE if where == "title" else "")
    table.add_column(HOSTILE if where == "head" else "x")
    table.add_row(HOSTILE if where == "cell" else "x" * 40)
    things = {"string": HOSTILE, "text": Text(HOSTILE), "panel": Panel(Text(HOSTILE))}
    out = printed(things.get(where, table))
    assert SHOWN in out
    assert not {"\x07", "\x9b", "\u202e"} & set(out)
    assert "\x1b[31m" not in out and "\x1b[2J" not in out


def test_our_own_colours_stay() -> None:
    assert "\x1b[32m" in printed(Text("fine", "green"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:PW@host:80/x", "http://***@host:80/x"),
        ("postgresql+psycopg://u:PW@@h/db", "postgresql+psycopg://***@h/db"),
        ("http:/user:PW@host", "http:/***@host"),
        ("see https://PW@host, too", "see https://***@host, too"),
        ("http://u:a/PW@host", "http://***@host"),
        ("http://h/?a=1&password=PW&b=2", "http://h/?a=1&password=***&b=2"),
        ("http://h?api_key=PW", "http://h?api_key=***"),
        ("http://127.0.0.1:4200/api", "http://127.0.0.1:4200/api"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
        ("mail me@host: no address", "mail me@host: no address"),
        ("planted:2:cluster@1", "planted:2:cluster@1"),
    ],
)
def test_passwords_of_addresses_are_hidden(text: str, shown: str) -> None:
    assert hide_passwords(text) == shown
    assert str(UserError(text, fix="mend it")).startswith(shown)


def test_an_address_that_is_wrapped_hides_its_password_too() -> None:
    assert "PW" not in printed(Text("postgresql://someone:PWPWPW@host.example.org/db"), width=20)


def test_libraries_log_and_warn_without_controls(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    try:
        clean_logs()
        clean_logs()
        logging.getLogger("a library").warning("cannot read %s, row %d", Path(HOSTILE), 7)
        shown = warnings.formatwarning(UserWarning(HOSTILE), UserWarning, "x.py", 1, "")
    finally:
        logging.setLogRecordFactory(factory)
    assert caplog.messages == [f"cannot read {SHOWN}, row 7"]
    assert SHOWN in shown and "\x1b" not in shown


def test_half_characters_can_be_printed() -> None:
    clean("a\udcff").encode()
    assert "�" in printed("a\udcff")


def test_messages_stay_short() -> None:
    one = UserError("x" * 100_000, where="y" * 100_000)
    assert len(str(one)) < 3_000
    many = UserErrors([UserError(f"mistake {n}") for n in range(1_000)])
    assert str(many).splitlines()[-1] == "… and 950 more"
    assert len(many.errors) == 50
