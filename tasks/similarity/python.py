"""A function of the user's: `score: {similarity: python, function: my_file.py:my_function}`.

The function gets the gold response and one response, and returns a number from 0 to 1. The file is
code that runs here, so that a settings file alone must not be able to start it: the environment
variable STAPLE_RUN_CODE=1 allows it.
"""

from __future__ import annotations

import hashlib
import numbers
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from pydantic import Field, model_validator

from constitutions.errors import UserError
from tasks.record.slot import Slot
from tasks.similarity.base import EMPTY, Chosen, Score, Similarity

ALLOWED = "STAPLE_RUN_CODE"


class FunctionSettings(Chosen):
    """Settings of the similarity "python"."""

    function: str | None = Field(default=None, pattern=r"^.+\.py:[A-Za-z_]\w*$")
    """The similarity "python": a Python file and the name of a function in it, as in
    my_file.py:overlap. It is called with the gold response and a response, and returns a number
    from 0 to 1. Needs the environment variable STAPLE_RUN_CODE=1."""

    @model_validator(mode="after")
    def _function_where_it_is_asked(self) -> FunctionSettings:
        if (self.similarity == "python") != (self.function is not None):
            raise ValueError("score.function to be set where score.similarity is 'python' only")
        return self


class Function(Similarity[FunctionSettings]):
    """The number that the user's function returns."""

    advice = "correct the function of score.function"

    @property
    def _place(self) -> tuple[Path, str]:
        """The file and the function's name."""
        assert self.settings.function is not None, "FunctionSettings sees to it"
        file, _, name = self.settings.function.rpartition(":")
        return Path(file).expanduser(), name

    @cached_property
    def function(self) -> Callable[[str, str], object]:
        """The function. This runs its file.

        Raises:
            UserError: it is not allowed, there is no such file or function, or the file fails.
        """
        self.check()
        file, name = self._place
        names: dict[str, object] = {"__name__": file.stem, "__file__": str(file)}
        try:
            exec(compile(self._source, str(file), "exec"), names)
            found = names.get(name)
        except Exception as error:
            raise self._wrong(f"the file fails: {type(error).__name__}: {error}") from error
        if not callable(found):
            raise self._wrong(f"the file defines no function '{name}'")
        return found

    def check(self) -> str:
        """See `Similarity.check`; the file is not run.

        Raises:
            UserError: `ALLOWED` is not set, or there is no such file.
        """
        if os.environ.get(ALLOWED) != "1":
            raise self._wrong(
                "this setting runs code from your file", f"set {ALLOWED}=1 to allow it"
            )
        _ = self._source
        return f"{super().check()} ({self.settings.function})"

    def noted(self, at: Slot) -> Slot:
        """See `Similarity.noted`: the scores depend on what the file holds."""
        return super().noted(at).using(function=hashlib.sha256(self._source).hexdigest())

    @cached_property
    def _source(self) -> bytes:
        """The file, read once: what is noted is what runs. Modules that it imports do not count."""
        file, _ = self._place
        if not file.is_file():
            raise self._wrong("there is no such file")
        return file.read_bytes()

    def compare(self, gold: str, texts: Sequence[str]) -> list[Score]:
        """See `Similarity.compare`. A text for which the function fails is unscored."""
        if not gold.strip():
            return [Score(None, f"gold: {EMPTY}")] * len(texts)
        return [self._score(gold, text) for text in texts]

    def _score(self, gold: str, text: str) -> Score:
        if not text.strip():
            return Score(None, EMPTY)
        try:
            value = self.function(gold, text)
        except UserError:
            raise
        except Exception as error:
            return Score(None, f"the function fails: {type(error).__name__}: {error}")
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if is_number and 0 <= (number := float(value)) <= 1:  # type: ignore[arg-type]
            return Score(number, None)
        return Score(None, f"the function returns no number from 0 to 1: {value!r:.80}")

    def _wrong(self, what: str, fix: str = "") -> UserError:
        where = f"setting 'score.function' = {self.settings.function}"
        return UserError(what, where=where, expected="" if fix else "FILE.py:FUNCTION", fix=fix)
