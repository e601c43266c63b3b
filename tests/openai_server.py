"""OpenAI-compatible servers for the tests, on loopback: a real one, one of ours, and a bad line."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import uvicorn
from servers import Server, free_port, run_server
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from models.policy import Policy, Request


class TransformersServer:
    """`transformers serve`: it keeps its port when it is killed and started again.

    A request names the directory of its model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self._stack = folder, free_port(), ExitStack()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        arguments = [
            "transformers", "serve", "--host", "127.0.0.1", "--port", str(self.port),
            "--device", "cpu",
        ]  # fmt: skip
        self._server: Server = self._stack.enter_context(
            run_server(arguments, self.folder, self.url, "/health")
        )

    def kill(self) -> None:
        self._server.kill()

    def close(self) -> None:
        self._stack.close()


def sampling_copy(model: Path, directory: Path) -> Path:
    """The model with `do_sample` on: without, `transformers serve` ignores the temperature."""
    shutil.copytree(model, directory)
    path = directory / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": True}))
    return directory


def app_over(policy: Policy) -> Starlette:
    """Our own engine as an OpenAI-compatible server: the one here that honours n and seed."""
    engine = threading.Lock()

    def complete(body: dict[str, Any]) -> Response:
        request = Request(
            messages=tuple(body["messages"]),
            key=str(body.get("seed")),
            n=body.get("n", 1),
            temperature=body.get("temperature", 1.0),
            top_p=body.get("top_p", 1.0),
            max_tokens=body["max_tokens"],
        )
        with engine:
            (completions,) = policy.generate([request])
        if completions[0].finish == "overflow":
            message = "This model's maximum context length is 8192 tokens. Please send fewer."
            return JSONResponse({"error": {"message": message, "code": 400}}, 400)
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": c.text},
                "finish_reason": c.finish,
            }
            for i, c in enumerate(completions)
        ]
        usage = {"completion_tokens": sum(c.tokens for c in completions)}
        return JSONResponse({"object": "chat.completion", "choices": choices, "usage": usage})

    async def chat(request: HttpRequest) -> Response:
        return await run_in_threadpool(complete, await request.json())

    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])


Answer = Response | Literal["hang", "cut"] | None
Plan = Callable[[int, dict[str, Any]], Answer]
"""(number of the request from 0, its body) to what is sent instead: None asks the server."""


class Proxy:
    """Stands before a server and fails as planned: a reply of its own, none, or half of one."""

    def __init__(self, upstream: str, plan: Plan) -> None:
        self.upstream, self.plan = upstream, plan
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answered: list[dict[str, Any]] = []
        """Bodies of the requests whose replies from the server were passed on."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = HttpRequest(scope, receive)
        raw = await request.body()
        self.bodies.append(json.loads(raw))
        self.headers.append(dict(request.headers))
        answer = self.plan(len(self.bodies) - 1, self.bodies[-1])
        if answer is None:
            answer = await self._forward(scope["path"], raw)
        if isinstance(answer, Response):
            await answer(scope, receive, send)
        elif answer == "hang":
            while (await receive())["type"] != "http.disconnect":
                pass
        else:  # uvicorn closes the connection of an app that stops in the middle
            start = {"type": "http.response.start", "status": 200}
            await send({**start, "headers": [(b"content-length", b"1000")]})
            await send({"type": "http.response.body", "body": b'{"choices": [', "more_body": True})

    async def _forward(self, path: str, raw: bytes) -> Response | Literal["cut"]:
        try:
            async with httpx.AsyncClient(timeout=60) as client:
                kind = {"content-type": "application/json"}
                reply = await client.post(self.upstream + path, content=raw, headers=kind)
        except httpx.RequestError:
            return "cut"
        if reply.status_code == 200:
            self.answered.append(json.loads(raw))
        return Response(reply.content, reply.status_code, media_type="application/json")


@contextmanager
def serving(app: Any, **more: Any) -> Iterator[str]:
    """The ASGI application on a free port, in a thread; gives its address."""
    config = uvicorn.Config(app, port=0, lifespan="off", log_level="critical", **more)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended at once"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
