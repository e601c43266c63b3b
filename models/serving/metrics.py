"""What a server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from models.serving.turns import Turn

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Outcome(Enum):
    """How an answer ended."""

    answered = "answered"
    refused = "refused"
    """It has no text: its prompt is too long, say."""
    failed = "failed"
    dropped = "dropped"
    """The client went."""


class Metrics:
    """Counters of one server; names begin with "staple_"."""

    media_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self._answers = Counter(
            "staple_answers", "Answers, by how they ended.", ["outcome"], registry=own
        )
        self._tokens = Counter("staple_tokens", "Tokens of all turns.", ["kind"], registry=own)
        self._turns = Counter(
            "staple_turns", "Turns that the policy has answered.", ["role"], registry=own
        )
        self._seconds = Histogram(
            "staple_answer_seconds", "Seconds to the end of an answer.", registry=own
        )
        self._batches = Histogram(
            "staple_batch_requests", "Requests in a batch.", buckets=SIZES, registry=own
        )
        self._waiting = Gauge(
            "staple_waiting_requests", "Requests that wait for a batch.", registry=own
        )
        for outcome in Outcome:
            self._answers.labels(outcome.value)

    def watch(self, waiting: Callable[[], int]) -> None:
        """Ask `waiting` for the number of waiting requests whenever the metrics are read."""
        self._waiting.set_function(waiting)

    def began(self, size: int) -> None:
        """A batch has begun."""
        self._batches.observe(size)

    def count(self, turn: Turn) -> None:
        """A turn has ended."""
        self._turns.labels(turn.role).inc()
        self._tokens.labels("prompt").inc(turn.prompt_tokens)
        self._tokens.labels("completion").inc(turn.completion.tokens)

    def ended(self, outcome: Outcome, seconds: float) -> None:
        """An answer has ended, `seconds` after it was asked for."""
        self._answers.labels(outcome.value).inc()
        self._seconds.observe(seconds)

    def text(self) -> str:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry).decode()
