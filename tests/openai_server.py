"""OpenAI-compatible servers for the tests, on loopback: a real one, one of ours, and a bad line."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import httpx
import uvicorn
from servers import Server, free_port, run_server
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from models.policy import Completion, Policy, Request


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


BASE = "ours"
"""What our server calls its model."""


class _Engine:
    """Our own engine behind vLLM's addresses, with its replies: it honours n, seed and stop, tells
    log-probabilities, and loads PEFT adapters while it runs. (Written after vLLM's source; the real
    one cannot be installed beside this project.)
    """

    def __init__(self, policy: Policy, load: Callable[[Path], Policy] | None) -> None:
        self.policy, self.load = policy, load
        self.adapters: dict[str, tuple[Path, Policy]] = {}
        self.blind = False
        """Whether it sees other paths than we do."""
        self.lock = threading.Lock()

    def complete(self, body: dict[str, Any]) -> Response:
        name, raw = body["model"], "prompt" in body
        if name != BASE and name not in self.adapters:
            return _error(404, f"The model `{name}` does not exist.", "NotFoundError")
        request = Request(
            messages=body["prompt"] if raw else tuple(body["messages"]),
            key=str(body.get("seed")),
            n=body.get("n", 1),
            temperature=body.get("temperature", 1.0),
            top_p=body.get("top_p", 1.0),
            max_tokens=body["max_tokens"],
            stop=tuple(body.get("stop", ())),
        )
        with self.lock:
            policy = self.policy if name == BASE else self.adapters[name][1]
            (completions,) = policy.generate([request])
        if completions[0].finish == "overflow":
            message = "This model's maximum context length is 8192 tokens. Please send fewer."
            return _error(400, message, "BadRequestError")
        told = body.get("logprobs") not in (None, False)
        choices = [_choice(i, c, request.stop, raw, told) for i, c in enumerate(completions)]
        usage = {"completion_tokens": sum(c.tokens for c in completions)}
        kind = "text_completion" if raw else "chat.completion"
        return JSONResponse({"object": kind, "model": name, "choices": choices, "usage": usage})

    def models(self) -> Response:
        cards = [{"id": BASE, "object": "model", "root": "/models/ours", "parent": None}]
        cards += [
            {"id": name, "object": "model", "root": str(path), "parent": BASE}
            for name, (path, _) in self.adapters.items()
        ]
        return JSONResponse({"object": "list", "data": cards})

    def add(self, body: dict[str, Any]) -> Response:
        name, path = body.get("lora_name"), body.get("lora_path")
        if not name or not path:
            return _error(400, "Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if self.blind or not Path(path, "adapter_config.json").exists():
            return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
        assert self.load
        with self.lock:
            self.adapters[name] = Path(path), self.load(Path(path))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    def remove(self, body: dict[str, Any]) -> Response:
        name = body.get("lora_name")
        if self.adapters.pop(name, None) is None:  # type: ignore[arg-type]
            return _error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def app_over(policy: Policy, load: Callable[[Path], Policy] | None = None) -> Starlette:
    """Our own engine as an OpenAI-compatible server; `load` makes a policy of an adapter's folder.

    Its state is `app.state.engine`. Without `load` it is as vLLM is without runtime adapters.
    """
    engine = _Engine(policy, load)

    def post(answer: Callable[[dict[str, Any]], Response]) -> Any:
        async def route(request: HttpRequest) -> Response:
            return await run_in_threadpool(answer, await request.json())

        return route

    async def models(request: HttpRequest) -> Response:
        return engine.models()

    addresses = {"chat/completions": engine.complete, "completions": engine.complete}
    if load:
        addresses |= {"load_lora_adapter": engine.add, "unload_lora_adapter": engine.remove}
    routes = [Route(f"/v1/{name}", post(f), methods=["POST"]) for name, f in addresses.items()]
    app = Starlette(routes=[Route("/v1/models", models), *routes])
    app.state.engine = engine
    return app


def _choice(
    index: int, completion: Completion, stop: tuple[str, ...], raw: bool, told: bool
) -> dict[str, Any]:
    """The engine tells a completion's log-probability, which its tokens share here."""
    ends = [completion.text.find(mark) for mark in stop if mark in completion.text]
    text = completion.text[: min(ends)] if ends else completion.text
    count = max(completion.tokens, 1)
    each = [completion.logprob / count] * count
    content = [{"token": "", "logprob": p, "bytes": [], "top_logprobs": []} for p in each]
    listed = {"token_logprobs": each} if raw else {"content": content}
    said = {"text": text} if raw else {"message": {"role": "assistant", "content": text}}
    finish = "stop" if ends else completion.finish
    return {"index": index, **said, "logprobs": listed if told else None, "finish_reason": finish}


def _error(status: int, message: str, kind: str = "InvalidUserInput") -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)


Answer = Response | Literal["hang", "cut"] | None
Plan = Callable[[int, dict[str, Any]], Answer]
"""(number of the request from 0, its body) to what is sent instead: None asks the server."""


class Proxy:
    """Stands before a server and fails as planned: a reply of its own, none, or half of one.

    `bodies` and `headers` are of the completions that were asked for, `paths` of everything else.
    """

    def __init__(self, upstream: str, plan: Plan) -> None:
        self.upstream, self.plan = upstream, plan
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.elsewhere: dict[str, Response] = {}
        """What is sent instead at other addresses."""
        self.answered: list[tuple[dict[str, Any], dict[str, Any]]] = []
        """Bodies and the server's replies that were passed on to somebody who still waited."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = HttpRequest(scope, receive)
        raw, answer = await request.body(), cast(Answer, None)
        if scope["path"].endswith("/completions"):
            self.bodies.append(json.loads(raw))
            self.headers.append(dict(request.headers))
            answer = self.plan(len(self.bodies) - 1, self.bodies[-1])
        else:
            self.paths.append(scope["path"])
            answer = self.elsewhere.get(scope["path"])
        if answer is None:
            answer = await self._forward(request, raw)
        if isinstance(answer, Response):
            await answer(scope, receive, send)
        elif answer == "hang":
            while (await receive())["type"] != "http.disconnect":
                pass
        else:  # uvicorn closes the connection of an app that stops in the middle
            start = {"type": "http.response.start", "status": 200}
            await send({**start, "headers": [(b"content-length", b"1000")]})
            await send({"type": "http.response.body", "body": b'{"choices": [', "more_body": True})

    async def _forward(self, request: HttpRequest, raw: bytes) -> Response | Literal["cut"]:
        method, url = request.method, self.upstream + request.url.path
        try:
            async with httpx.AsyncClient(timeout=60) as client:
                kind = {"content-type": "application/json"}
                reply = await client.request(method, url, content=raw, headers=kind)
        except httpx.RequestError:
            return "cut"
        completed = reply.status_code == 200 and url.endswith("/completions")
        if completed and not await request.is_disconnected():
            self.answered.append((json.loads(raw), reply.json()))
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
