"""One experiment is written by one run at a time; who comes second waits, and is told for whom.

On one machine a file lock tells. Machines that share nothing but MLflow claim the experiment in the
record: a tag that a heartbeat keeps alive. Flows hold the experiment around all that they write.
"""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from models.files import text_sha256
from tasks.record import locks
from tasks.record.progress import say
from tasks.record.record import Attempts, Record

CLAIM = "writer."
"""Tags of the MLflow experiment: who writes it, or wants to; one tag each."""

CLAIMED = ("place", "pid", "what", "held")
"""What a claim says, beside the time of its last heartbeat."""

_HELD: dict[tuple[str, str], Attempts] = {}
"""What this process holds, and what its runs have made or found meanwhile."""


@contextmanager
def writing(record: Record, command: str) -> Iterator[None]:
    """Be the only one that writes an experiment; wait for who does, and say who that is.

    What this process holds already it may hold again: runs have parts that hold the same.

    Args:
        command: what is told to who waits, as in "staple run planted".

    Raises:
        UserError: the experiment was deleted, or the record cannot be used.
    """
    if _key(record) in _HELD:
        yield
        return
    what = f"{command}, on {platform.node()} since {time.strftime('%H:%M')}"
    # by its id: the same experiment has one lock, whether a server is asked or the file
    name = text_sha256(f"{record.experiment} {record.experiment_id}")[:24]
    with (
        locks.held(record.home / "experiments" / f"{name}.lock", what),
        _claimed(record, what),
    ):
        _HELD[_key(record)] = {}
        try:
            yield
        finally:
            del _HELD[_key(record)]


def made(record: Record) -> Attempts:
    """What the run that holds the experiment in this process made or found; empty, where none."""
    return _HELD.get(_key(record), {})


def _key(record: Record) -> tuple[str, str]:
    return record.tracking_uri, record.experiment


@contextmanager
def _claimed(record: Record, what: str) -> Iterator[None]:
    """Hold the claim of this machine, as long as no other one has one that lives."""
    claim = _Claim(record, what)
    try:
        claim.take()
        with locks.heartbeat(claim.beat):
            yield
    finally:
        with suppress(Exception):  # the record may be away: the claim dies with its heartbeat
            claim.withdraw()


class _Claim:
    """A claim to write an experiment.

    Whoever reads no other claim after having written one of their own has the experiment: of two,
    at least one sees the other. Where both do, the first by name stays and the other withdraws.
    """

    def __init__(self, record: Record, what: str) -> None:
        self._record, self._tag = record, f"{CLAIM}{uuid.uuid4().hex[:12]}"
        place = locks.place(record.home)
        self._said = {"place": place, "pid": os.getpid(), "what": what, "held": False}
        self._claims = False
        self._seen: dict[str, tuple[Any, float]] = {}

    def take(self) -> None:
        """Wait until it is ours."""
        told = False
        while True:
            others = self._others()
            if not others:
                if self._claims:
                    break
                self.beat()
                continue  # and look again
            if any(other["held"] for other in others.values()) or min(others) < self._tag:
                self.withdraw()
            elif self._claims:
                self.beat()  # who waits for the other to withdraw lives
            if not told:
                first = others[min(others)]
                say(f"waiting for process {first['pid']}: {first['what']}")
                told = True
            time.sleep(min(2.0, locks.HEARTBEAT_SECONDS / 4))
        self._said["held"] = True
        self.beat()

    def beat(self) -> None:
        """Say that we live."""
        self._claims = True
        said = json.dumps({**self._said, "beat": time.time()})
        self._record.client.set_experiment_tag(self._record.experiment_id, self._tag, said)

    def withdraw(self) -> None:
        """Let others have it."""
        if self._claims:
            self._claims = False
            self._drop(self._tag)

    def _others(self) -> dict[str, dict[str, Any]]:
        """The other claims that live; what dead ones left is taken away."""
        tags = self._record.client.get_experiment(self._record.experiment_id).tags
        living: dict[str, dict[str, Any]] = {}
        for tag in tags:
            if tag.startswith(CLAIM) and tag != self._tag:
                said = _read(tags[tag])
                if said and self._lives(tag, said):
                    living[tag] = said
                else:
                    self._drop(tag)
        return living

    def _lives(self, tag: str, said: dict[str, Any]) -> bool:
        """Whether its heartbeat goes on, whatever the two clocks say; here we hold its lock."""
        if said["place"] == self._said["place"]:
            return False
        now, missed = time.monotonic(), locks.BEATS_MISSED * locks.HEARTBEAT_SECONDS
        beat, since = self._seen.get(tag, (None, now))
        if beat != said["beat"]:
            since = now
        self._seen[tag] = said["beat"], since
        return abs(time.time() - said["beat"]) < missed or now - since < missed / 2

    def _drop(self, tag: str) -> None:
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):  # another one took it away in the same moment
            self._record.client.delete_experiment_tag(self._record.experiment_id, tag)


def _read(text: str) -> dict[str, Any] | None:
    """What a claim says; None: it is none of ours."""
    try:
        said = json.loads(text)
        return {**said, "beat": float(said["beat"]), **{n: said[n] for n in CLAIMED}}
    except (ValueError, TypeError, KeyError):
        return None
