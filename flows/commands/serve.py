"""`staple serve`: a trained policy behind an OpenAI-compatible server of our own.

`models/serving` has the server; this module finds the policy in the record and runs it.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

import uvicorn
from pydantic import SecretStr

from constitutions.errors import UserError
from constitutions.terminal import say
from flows.experiment import Experiment, newest, open_experiment
from flows.methods import method_of
from flows.schema import ExperimentSettings
from models.chat import Chat
from models.chat_template import ChatError
from models.endpoint.address import key_in
from models.policy import Messages
from models.serving.app import ChatServer, Defaults, is_loopback
from models.serving.batching import Batcher, Count
from models.serving.metrics import Metrics
from models.serving.turns import MODES, Conversation, Mode, Role
from tasks.policies.answers import noise_key
from tasks.policies.opening import PolicySource
from tasks.record import interruption
from tasks.rows import prompt_id

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DRAIN_SECONDS = 120
"""Most seconds that what is being answered may take after a signal."""
BACKLOG = 2048
"""Connections that wait for an answer, as uvicorn has them."""
MOST_TOKENS = 4096
"""Most tokens of a turn, unless the command line says otherwise."""
ENDPOINT_THREADS = 8
"""Batches at once behind an endpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a server listens, and the key that it asks for.

    Raises:
        UserError: others could reach it, and there is no key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: SecretStr | None = None

    def __post_init__(self) -> None:
        if self.key is None and not is_loopback(self.host):
            raise UserError(
                "other machines can reach this address, and nobody is asked for a key",
                where=f"--host {self.host}",
                expected="a loopback address, or a key",
                fix="export STAPLE_KEY=… and add --key-variable STAPLE_KEY",
            )

    @property
    def url(self) -> str:
        """What clients are given as their base URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    def bound(self) -> socket.socket:
        """A socket of its own, which does not listen yet: until the policy is loaded, nobody is
        answered. A server that finds another one listening fails at once; of two that load at the
        same time, the later one (`listening`).

        Raises:
            UserError: another program has the port, or the address is not this machine's.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        own = socket.socket(family, socket.SOCK_STREAM)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind((self.host, self.port))
        except (OSError, UnicodeError) as error:
            own.close()
            raise self._taken(error) from None
        return own

    def listening(self, own: socket.socket) -> socket.socket:
        """The socket, which listens from now on.

        Raises:
            UserError: another program has begun to listen there.
        """
        try:
            own.listen(BACKLOG)
        except OSError as error:
            raise self._taken(error) from None
        return own

    def _taken(self, error: Exception) -> UserError:
        return UserError(
            f"cannot listen there: {error}",
            where=f"--host {self.host}, --port {self.port}",
            expected="an address of this machine, and a port that no other program has",
            fix="choose another --port",
        )


def place(host: str, port: int, key_variable: str) -> Place:
    """Where to listen, with the key of an environment variable (empty: none).

    Raises:
        UserError: the variable holds no key; or there is none, and others can reach the address.
    """
    key = key_in(key_variable, f"--key-variable {key_variable}") if key_variable else None
    return Place(host=host, port=port, key=key)


def checked_mode(name: str) -> Mode | None:
    """The mode of that name; None for an empty one.

    Raises:
        UserError: there is no such mode.
    """
    found = next((mode for mode in MODES if mode == name), None)
    if name and found is None:
        raise UserError(
            "there is no such mode", where=f"--mode {name}", expected=" or ".join(MODES)
        )
    return found


def serve(
    settings: ExperimentSettings,
    iteration: int | None,
    mode: Mode | None,
    where: Place,
    threshold: float | None = None,
    most_tokens: int = MOST_TOKENS,
) -> None:
    """Serve the policy of an iteration until a signal arrives.

    Args:
        iteration: 0 is the initial policy; None is the newest trained policy.
        mode: of requests that name none; None: the last of the policy's modes.
        threshold: of requests in mode gated that name none; None: the one that evaluation chose
            (`tasks.judging.gate.gate_metrics`), or 1 before there is any.
        most_tokens: of a turn, whatever a request asks for; never less than evaluation's.

    Raises:
        UserError: the policy cannot be loaded or has no such mode, or `where` cannot be used.
    """
    opened = open_chat_server(settings, iteration, mode, where.key, threshold, most_tokens)
    with where.bound() as bound, opened as service:
        default = service.defaults.mode
        listening = where.listening(bound)
        say(f"{service.model} answers at {where.url} (mode {default}). End it with Ctrl-C.")
        interruption.note(all="it answers no more", grace=str(DRAIN_SECONDS + 5))
        _Server(
            uvicorn.Config(
                service.app,
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=DRAIN_SECONDS,
            )
        ).run([listening])
    say("All that was asked is answered.")


class _Server(uvicorn.Server):
    """A server that a signal ends once: what is being answered is finished, new connections are
    refused. (uvicorn's own takes a second Ctrl-C for impatience, but `flows.commands.program` and
    the terminal both send one.)"""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._end) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.should_exit = True


@contextmanager
def open_chat_server(
    settings: ExperimentSettings,
    iteration: int | None = None,
    mode: Mode | None = None,
    key: SecretStr | None = None,
    threshold: float | None = None,
    most_tokens: int = MOST_TOKENS,
) -> Iterator[ChatServer]:
    """The service of an iteration's policy, named as the experiment; see `serve`."""
    initial = iteration == 0 or not settings.last
    at = 0 if initial else newest(settings, "train", iteration).iteration
    experiment = open_experiment(settings)
    own, source = experiment.settings_at(at), experiment.policy(at)
    modes = _modes(settings, source)
    if mode is not None and mode not in modes:
        raise UserError(
            "this policy has no such mode: " + _why_not(settings, source),
            where=f"--mode {mode}",
            expected=" or ".join(modes),
        )
    metrics = Metrics()
    batcher = Batcher(
        source.load(),
        counter(source),
        threads=ENDPOINT_THREADS if source.settings.endpoint else 1,
        began=metrics.began,
    )
    metrics.watch(lambda: batcher.waiting)
    answering = own.evaluate
    try:
        yield ChatServer(
            model=settings.experiment,
            conversation=Conversation(
                batcher=batcher,
                templates=source.templates,
                max_principle_tokens=answering.max_principle_tokens,
                votes=answering.votes,
                key=_key,
            ),
            modes=modes,
            defaults=Defaults(
                mode=mode or modes[-1],
                temperature=answering.temperature,
                max_tokens=answering.max_response_tokens,
                threshold=_chosen(experiment, at) if threshold is None else threshold,
                most_tokens=max(most_tokens, answering.max_response_tokens),
            ),
            metrics=metrics,
            key=key,
        )
    finally:
        batcher.close(seconds=DRAIN_SECONDS)


def _chosen(experiment: Experiment, iteration: int) -> float:
    """The threshold of an iteration's gate that its evaluation chose."""
    evaluated = experiment.record.current("evaluate", iteration)
    return evaluated.metrics.get("gate/threshold", 1.0) if evaluated else 1.0


def _modes(settings: ExperimentSettings, source: PolicySource) -> tuple[Mode, ...]:
    """The modes of a policy, the last of which holds unless told otherwise."""
    if method_of(settings).constitutional:
        return ("first",)
    gated = source.templates.gated and not source.settings.endpoint
    return MODES if gated else ("first", "refine")


def _why_not(settings: ExperimentSettings, source: PolicySource) -> str:
    if method_of(settings).constitutional:
        return f"one of method {settings.method} answers once"
    if source.templates.gated:
        return "an endpoint does not tell how probable it is to keep an answer"
    return "it was not trained with train.gate"


def _key(seed: int, prompt: Messages, role: Role) -> str:
    return noise_key(seed, prompt_id(prompt), role)


def counter(source: PolicySource) -> Count:
    """Counts tokens of prompts with the base's tokenizer: a policy does not tell them.

    Raises:
        UserError: there is no such tokenizer.
    """
    from models.training.bases import load_tokenizer

    chat = Chat(load_tokenizer(source.model, source.settings.revision), source.settings)

    def count(messages: Messages) -> int:
        with suppress(ChatError):  # the policy says that it is refused
            return len(chat.prompt(messages))
        return 0

    return count
