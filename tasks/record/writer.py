"""One experiment is written by one run at a time; the next one waits, and says for whom.

On one machine a file lock decides. Machines that share nothing but MLflow claim the experiment in
the record: a tag that a heartbeat keeps alive. Flows hold the experiment around all that they
write, so no stage has to wait for another machine by itself.
"""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from models.files import text_sha256
from tasks.record import locks
from tasks.record.progress import say
from tasks.record.record import Attempts, Record

CLAIM = "writer."
"""Tags of the MLflow experiment: one for each run that writes it, or wants to."""

_HELD: dict[tuple[str, str], Attempts] = {}
"""The experiments that this process holds, and what its runs have made or found meanwhile."""


@contextmanager
def writing(record: Record, command: str) -> Iterator[None]:
    """Be the only run that writes an experiment; wait for another one, and say which it is.

    What this process holds it may hold again: parts of a run hold the same experiment.

    Args:
        command: this run, as a waiting one shows it: "staple run planted".

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
    """What the run that holds the experiment in this process made or found; empty without one."""
    return _HELD.get(_key(record), {})


def _key(record: Record) -> tuple[str, str]:
    return record.tracking_uri, record.experiment


@contextmanager
def _claimed(record: Record, what: str) -> Iterator[None]:
    claim = _Claim(record, what)
    try:
        claim.take()
        with locks.heartbeat(claim.beat):
            yield
    finally:
        with suppress(Exception):  # the record may be away: the claim dies with its heartbeat
            claim.withdraw()


class _Facts(NamedTuple):
    """What the tag of a claim holds, as JSON."""

    place: str
    pid: int
    what: str
    held: bool
    beat: float
    """The time of its last heartbeat, by its own clock."""

    @classmethod
    def read(cls, text: str) -> _Facts | None:
        """None: another program wrote it."""
        with suppress(ValueError, TypeError, KeyError):
            facts = json.loads(text)
            facts["beat"] = float(facts["beat"])
            return cls(**{name: facts[name] for name in cls._fields})
        return None


class _Claim:
    """A claim to write an experiment.

    A run that has written its own claim and then reads no other one has the experiment: of two, at
    least one sees the other. If both do, the first by name stays and the other withdraws.
    """

    def __init__(self, record: Record, what: str) -> None:
        self._record, self._tag = record, f"{CLAIM}{uuid.uuid4().hex[:12]}"
        self._facts = _Facts(locks.place(record.home), os.getpid(), what, held=False, beat=0.0)
        self._claims = False
        self._seen: dict[str, tuple[float, float, float]] = {}
        """Another's tag → its last heartbeat, when that was first seen here, and when last."""

    def take(self) -> None:
        """Wait until this claim is the only one."""
        waits = False
        while (others := self._others()) or not self._claims:
            if not others:
                self.beat()
                continue  # and look again
            if any(other.held for other in others.values()) or min(others) < self._tag:
                self.withdraw()
            elif self._claims:
                self.beat()  # alive while it waits for the other to withdraw
            if not waits:
                first = others[min(others)]
                say(f"waiting for process {first.pid}: {first.what}")
                waits = True
            time.sleep(min(2.0, locks.HEARTBEAT_SECONDS / 4))
        self._facts = self._facts._replace(held=True)
        self.beat()

    def beat(self) -> None:
        """Write the claim, or renew it."""
        self._claims = True
        text = json.dumps(self._facts._replace(beat=time.time())._asdict())
        self._record.client.set_experiment_tag(self._record.experiment_id, self._tag, text)

    def withdraw(self) -> None:
        """Let another run have the experiment."""
        if self._claims:
            self._claims = False
            self._delete(self._tag)

    def _others(self) -> dict[str, _Facts]:
        """The other claims that are alive, by tag; dead ones are deleted."""
        tags = self._record.client.get_experiment(self._record.experiment_id).tags
        alive: dict[str, _Facts] = {}
        for tag in tags:
            if tag.startswith(CLAIM) and tag != self._tag:
                facts = _Facts.read(tags[tag])
                if facts and self._is_alive(tag, facts):
                    alive[tag] = facts
                else:
                    self._delete(tag)
        return alive

    def _is_alive(self, tag: str, facts: _Facts) -> bool:
        """Whether its heartbeat continues, even if the two clocks differ. Here nobody's does: this
        process holds the lock."""
        if facts.place == self._facts.place:
            return False
        now, missed = time.monotonic(), locks.BEATS_MISSED * locks.HEARTBEAT_SECONDS
        beat, since, last = self._seen.get(tag, (None, now, now))
        if beat != facts.beat or now - last > missed / 2:  # the record was away from both
            since = now
        self._seen[tag] = facts.beat, since, now
        return abs(time.time() - facts.beat) < missed or now - since < missed / 2

    def _delete(self, tag: str) -> None:
        from mlflow.exceptions import MlflowException

        with suppress(MlflowException):  # another run deleted it in the same moment
            self._record.client.delete_experiment_tag(self._record.experiment_id, tag)
