"""A judge with a known rule, behind a real OpenAI-compatible server: the shorter response wins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from openai_server import BASE, Proxy, app_over, serving
from scripted import Script, responses

from models.policy import Message


def size(text: str) -> int:
    """Characters as a judge sees them, who reads line by line."""
    return len("\n".join(text.splitlines()))


def brief(messages: Sequence[Message]) -> str:
    """Prefers the response with fewer characters; of two that are as long the one it read first."""
    asked = messages[-1]["content"]
    if "###Response A:" not in asked:
        return "Ready."
    first, second = (
        "\n".join(line.removeprefix("> ") for line in shown.split("\n"))
        for shown in responses(asked)
    )
    return f"The shorter one. [RESULT] {'A' if len(first) <= len(second) else 'B'}"


@dataclass
class Judge:
    """The server, and what it was asked."""

    address: str
    proxy: Proxy
    script: Script

    @property
    def asked(self) -> list[str]:
        texts = [body["messages"][-1]["content"] for body in self.proxy.bodies]
        return [text for text in texts if "###Response A:" in text]

    def options(self, **more: Any) -> list[str]:
        given = {
            "judge.kind": "pairwise",
            "judge.policy.model": "small/judge",
            "judge.policy.served_model": BASE,
            "judge.endpoint": self.address,
            "judge.retries": 0,
            **more,
        }
        return [part for name, value in given.items() for part in ("--set", f"{name}={value}")]


@contextmanager
def judging() -> Iterator[Judge]:
    """The judge, served."""
    script = Script(brief)
    with serving(app_over(script)) as upstream:
        proxy = Proxy(upstream, lambda i, body: None)
        with serving(proxy) as address:
            yield Judge(address, proxy, script)
