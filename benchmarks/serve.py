"""`python -m benchmarks.serve [FOLDER] [ROUNDS]`: `staple serve` under load.

500 prompts of 60 tokens by 32 clients that each wait for their answer, three rounds; then the same
with every fifth client gone before its answer. The policy is a 15M-parameter Llama with random
weights: its answers end at their limits. Seconds are the processor's, of the server alone: the
clients have a process of their own. Evaluation answers the same prompts with the same seed, all
at once, and as many at a time as there are clients.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

import httpx
import psutil

from benchmarks.random_model import random_llama, random_text
from models.policy import Message
from tasks.rows import Prompt, prompt_id

PROMPTS, LENGTH, CLIENTS, SEED = 500, 60, 32, 0
SETTINGS = {
    "policy.quantization": "none",
    "policy.templates": "terse",
    "evaluate.max_response_tokens": 32,
    "evaluate.max_principle_tokens": 12,
}
TIMEOUT = 600.0
Texts = list[str]


def main() -> None:
    """Measure, and print the figures."""
    place = Path(sys.argv[1] if len(sys.argv) > 1 else mkdtemp()).absolute()
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    os.environ["STAPLE_HOME"] = str(place / ".staple")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{place}/mlflow.db"
    from flows.commands.cli import _environment

    _environment()
    from flows.experiment import note_settings, open_experiment
    from flows.settings import load_settings, with_changes
    from tasks.policies.answers import Generation

    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    model = place / "model"
    if not model.exists():
        random_llama(model)
    settings = with_changes(load_settings("planted"), {"policy.model": str(model), **SETTINGS})
    note_settings(settings)
    source = open_experiment(settings).policy(0)
    draw = random.Random(SEED)
    prompts = [_prompt(random_text(LENGTH, draw)) for _ in range(PROMPTS)]
    generation = Generation(
        templates=source.templates, settings=settings.evaluate, seed=SEED, iteration=0
    )
    policy = source.load()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "flows.commands.program"]
    own = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    server = subprocess.Popen(
        [*command, "serve", "planted", "--iteration", "0", "--port", str(port)],
        env=os.environ | own,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(server, url)
        own_seconds, few_seconds, server_seconds = [], [], []
        asyncio.run(_load(url, prompts[:CLIENTS]))  # both are warm
        generation.ask(policy, prompts[:CLIENTS])
        before = _memory(server)
        for _ in range(rounds):
            began = time.process_time()
            wanted = [row.refined for row in generation.ask(policy, prompts)]
            own_seconds.append(time.process_time() - began)
            began = time.process_time()
            for start in range(0, PROMPTS, CLIENTS):
                generation.ask(policy, prompts[start : start + CLIENTS])
            few_seconds.append(time.process_time() - began)
            began = _seconds(server)
            found = asyncio.run(_load(url, prompts))
            server_seconds.append(_seconds(server) - began)
            if found != wanted:
                raise AssertionError("the server answers otherwise than evaluation")
        middle = _memory(server)
        answered, dropped = asyncio.run(_chaos(url, prompts))
        after = _memory(server)
        counted = httpx.get(f"{url}/metrics").text
        server.send_signal(signal.SIGTERM)
        code = server.wait(150)
    finally:
        server.kill()
        server.wait()
    ours = median(server_seconds)
    print(f"same answers: {PROMPTS} of {PROMPTS} in each of {rounds} rounds")
    for name, seconds in (
        ("evaluation", own_seconds),
        (f"evaluation, {CLIENTS} at a time", few_seconds),
        ("server", server_seconds),
    ):
        print(f"{name}: {median(seconds):.1f} s of the processor; {[f'{s:.1f}' for s in seconds]}")
    print(f"throughput as a ratio to evaluation's: {median(own_seconds) / ours:.2f}")
    print(f"to evaluation's, {CLIENTS} at a time: {median(few_seconds) / ours:.2f}")
    print(f"with disconnects: {answered} answered, each once; {dropped} gone")
    print(f"memory: {before:.0f} MB before, {middle:.0f} after the rounds, {after:.0f} at the end")
    print(
        "\n".join(line for line in counted.splitlines() if line.startswith("staple_answers_total"))
    )
    print(f"SIGTERM: exit code {code}")


def _prompt(text: str) -> Prompt:
    turns = (Message(role="user", content=text),)
    return Prompt(prompt_id=prompt_id(turns), prompt=turns, gold="", source="random")


def _body(prompt: Prompt) -> dict[str, object]:
    return {"model": "planted", "messages": list(prompt.prompt), "seed": SEED}


async def _load(url: str, prompts: Sequence[Prompt]) -> Texts:
    """The answers to all prompts, asked by `CLIENTS` clients."""
    waiting, found = iter(enumerate(prompts)), [""] * len(prompts)

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as http:
            for i, prompt in waiting:
                reply = await http.post("/v1/chat/completions", json=_body(prompt))
                found[i] = reply.raise_for_status().json()["choices"][0]["message"]["content"]

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return found


async def _chaos(url: str, prompts: Sequence[Prompt]) -> tuple[int, int]:
    """How many were answered, and how many went before: every fifth, streams among them."""
    waiting, identities, gone = iter(enumerate(prompts)), list[str](), 0

    async def client() -> None:
        nonlocal gone
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as http:
            for i, prompt in waiting:
                leaves = i % 5 == 4
                body = _body(prompt) | {"stream": i % 2 == 0}
                try:
                    patience = 0.02 * (i % 50) if leaves else TIMEOUT
                    reply = await http.post("/v1/chat/completions", json=body, timeout=patience)
                    text = reply.raise_for_status().text
                    identities.append(
                        text.partition('"id": "' if body["stream"] else '"id":"')[2][:41]
                    )
                except httpx.TimeoutException:
                    gone += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    if len(set(identities)) != len(identities) or len(identities) + gone != len(prompts):
        raise AssertionError("a request was answered twice, or never")
    return len(identities), gone


def _family(server: subprocess.Popen[bytes]) -> list[psutil.Process]:
    parent = psutil.Process(server.pid)
    return [parent, *parent.children(recursive=True)]


def _seconds(server: subprocess.Popen[bytes]) -> float:
    times = [process.cpu_times() for process in _family(server)]
    return sum(t.user + t.system for t in times)


def _memory(server: subprocess.Popen[bytes]) -> float:
    return max(process.memory_info().rss for process in _family(server)) / 1e6


def _wait(server: subprocess.Popen[bytes], url: str) -> None:
    while True:
        if server.poll() is not None:
            raise AssertionError("the server ended at once")
        try:
            httpx.get(f"{url}/health", timeout=2)
            return
        except httpx.TransportError:
            time.sleep(0.2)


if __name__ == "__main__":
    main()
