"""Proxies of the environment: loopback is reached past them, other hosts through them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from servers import free_port

from constitutions.errors import UserError
from models.endpoint.client import Endpoint, Limits, run_async
from models.endpoint.proxies import is_loopback, keep_loopback_direct, proxy_of
from models.endpoint.server import open_server
from models.policy import PolicySettings, Request

ROOT = Path(__file__).parent.parent.parent
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
QUICK = Limits(timeout=5, patience=0.1, start=0.1, backoff=0.01)
REPLY = (
    b'{"model": "m", "choices": [{"message": {"content": "Yes."}, "finish_reason": "stop"}],'
    b' "usage": {"completion_tokens": 2}}'
)


class Recording:
    """An HTTP server that answers anything as a chat model would, and notes what it was asked."""

    def __init__(self) -> None:
        asked = self.asked = list[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked.append(self.path)
                self.rfile.read(int(self.headers["Content-Length"]))
                self._say(REPLY)

            def do_GET(self) -> None:
                asked.append(self.path)
                self._say(b'{"data": [{"id": "m"}], "experiments": []}')

            def _say(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]


@pytest.fixture
def recording() -> Iterator[type[Recording]]:
    started = list[Recording]()

    class Started(Recording):
        def __init__(self) -> None:
            super().__init__()
            threading.Thread(target=self.server.serve_forever, args=(0.01,)).start()
            started.append(self)

    yield Started
    for one in started:
        one.server.shutdown()
        one.server.server_close()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_model_on_loopback_is_asked_past_the_proxy(
    recording: type[Recording], monkeypatch: pytest.MonkeyPatch, host: str, variable: str
) -> None:
    server, proxy = recording(), recording()
    for address in (f"http://127.0.0.1:{proxy.port}", f"http://127.0.0.1:{free_port()}"):
        monkeypatch.setenv(variable, address)
        settings = PolicySettings(model="m", endpoint=f"http://{host}:{server.port}")
        policy = open_server(settings, limits=QUICK)
        ((answer,),) = policy.generate(
            [Request(messages=({"role": "user", "content": "?"},), key="k", max_tokens=8)]
        )
        assert answer.text == "Yes."
    assert server.asked
    assert proxy.asked == []


def test_another_host_is_asked_through_the_proxy(
    recording: type[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = recording()
    monkeypatch.setenv("HTTP_PROXY", f"127.0.0.1:{proxy.port}")
    assert asked_of("http://model.invalid:8000") == "Yes."
    assert proxy.asked == ["http://model.invalid:8000/v1/chat/completions"]


def test_a_proxy_that_does_not_answer_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", f"http://me:hidden@127.0.0.1:{free_port()}")
    said = refusal("https://model.invalid")
    assert "the server does not answer" in said
    assert "through the proxy in $https_proxy: add model.invalid to NO_PROXY" in said
    assert "hidden" not in said


@pytest.mark.parametrize(
    "address", ["socks9://me:hidden@127.0.0.1:9", "http://me:hidden@127.0.0.1:99999999"]
)
def test_a_proxy_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", address)
    said = refusal("http://model.invalid")
    assert "$ALL_PROXY" in said
    assert "NO_PROXY" in said
    assert "hidden" not in said


def asked_of(address: str) -> str:
    endpoint = Endpoint(address, limits=QUICK)

    async def ask() -> str:
        async with endpoint.connect() as connection:
            return (await connection.ask({"model": "m", "messages": []})).texts[0]

    return run_async(ask())


def refusal(address: str) -> str:
    settings = PolicySettings(model="m", endpoint=address)
    with pytest.raises(UserError) as caught:
        open_server(settings, limits=QUICK).generate([])
    return str(caught.value)


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.9.8.7", "127.1", "2130706433",
     "0x7f000001", "::1", "[::1]", "::ffff:127.0.0.1", "0.0.0.0", "0:0:0:0:0:0:0:1"],
)  # fmt: skip
def test_loopback_however_it_is_written(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["localhost.example.org", "127.0.0.1.example.org", "10.0.0.1", "128.0.0.1", "mylocalhost",
     "fe80::1%eth0", "", "127.0.0.one"],
)  # fmt: skip
def test_what_is_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_what_no_proxy_lists_is_asked_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    monkeypatch.setenv("NO_PROXY", ".inside.example, 10.0.0.9")
    for url in ("http://a.inside.example/", "http://10.0.0.9:8000", "http://127.0.0.1"):
        assert proxy_of(url) is None
    assert proxy_of("https://outside.example") is None
    through = proxy_of("http://outside.example")
    assert through is not None
    assert (through.address, through.source) == ("http://proxy.invalid:3128", "$HTTP_PROXY")


def test_no_proxy_keeps_what_it_lists_and_grows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "inside.example, ::1")
    monkeypatch.delenv("no_proxy", raising=False)
    for _ in range(2):
        keep_loopback_direct()
        assert os.environ["NO_PROXY"] == "inside.example,::1,localhost,127.0.0.1,127.0.0.0/8"
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"]


def test_the_command_line_keeps_the_clients_of_mlflow_and_prefect_on_loopback(
    recording: type[Recording],
) -> None:
    """Both libraries read the environment: their own clients ask, beside a recording proxy."""
    server, proxy = recording(), recording()
    code = (
        "import os, sys\n"
        "from flows.commands.cli import _environment\n"
        "_environment()\n"
        "import httpx, requests\n"
        "for url in sys.argv[1:]:\n"
        "    httpx.get(url + '/httpx'); requests.get(url + '/requests')\n"
    )
    clean = {k: v for k, v in os.environ.items() if k.upper() not in VARIABLES}
    addresses = [f"http://127.0.0.1:{server.port}", f"http://localhost:{server.port}"]
    subprocess.run(
        [sys.executable, "-c", code, *addresses],
        cwd=ROOT,
        env={**clean, "HTTP_PROXY": f"http://127.0.0.1:{proxy.port}", "no_proxy": "a.example"},
        check=True,
    )
    assert server.asked == ["/httpx", "/requests"] * 2
    assert proxy.asked == []
