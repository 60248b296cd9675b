"""The comparison of a server with itself."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any, ClassVar

import pytest

from lynx_learn.cli import main
from lynx_learn.integrations.client import ServerOptions, bench_server


class Page(BaseHTTPRequestHandler):
    """A server's answer to whatever is asked: what `server.page` holds, or 404 without."""

    def do_GET(self) -> None:
        self.send_response(200 if self.server.page else 404)  # type: ignore[attr-defined]
        self.end_headers()
        self.wfile.write(self.server.page)  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'data: {"error": {"message": "EngineCore died"}}\n\n')

    def log_message(self, *_: Any) -> None:
        """Quietly."""


class Speculating(Page):
    """Two engines that answer with two tokens; each answer verifies two requests with two drafts each, and all but one are taken
    where nothing is skipped."""

    drafted: ClassVar[dict[bool, int]] = {True: 0, False: 0}

    def do_GET(self) -> None:
        asked = sum(self.drafted.values())
        taken = 2 * self.drafted[True] + 3 * self.drafted[False]
        lines = ["lynx_moe_layers 6.0", 'lynx_steps_total{outcome="acted"} 1.0']
        lines += [f"lynx_experts_{name}_total 1.0" for name in ("routed", "loaded")]
        for name, count in (("drafts", 2 * asked), ("draft_tokens", 4 * asked), ("accepted_tokens", taken)):
            lines += [f'vllm:spec_decode_num_{name}_total{{engine="{i}"}} {count / 2}' for i in range(2)]
        self.send_response(200)
        self.end_headers()
        self.wfile.write("\n".join([*lines, ""]).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.drafted[bool(body["vllm_xargs"]["lynx"])] += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'data: {"choices": [{"token_ids": [1, 2]}]}\n\n')


def test_accepted_drafts_are_told_apart_by_whether_experts_are_skipped() -> None:
    with HTTPServer(("127.0.0.1", 0), Speculating) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        found = bench_server(ServerOptions(address, prompts=4, tokens=2, concurrency=1, turns=2))["speculation"]
        server.shutdown()
    assert found["accepted_of_drafted"] == {"off": 3 / 4, "on": 2 / 4}
    assert found["tokens_per_verification"] == {"off": 1 + 3 / 2, "on": 2}
    assert found["accepted_per_second"]["on"] > 0


@pytest.mark.parametrize(
    ("words", "page", "line"),
    [
        (
            [],
            b"vllm:num_requests_running 0.0\n",
            "shows no counters of skipped experts: start the server with LYNX_SELECTOR",
        ),
        ([], b"lynx_moe_layers 6.0\n", "broke off an answer ({'message': 'EngineCore died'})"),
        ([], b"", "/metrics answers 404"),
        ([], None, "no server answers at http://127.0.0.1:"),
        (["--prompts", "100000"], b"", "--prompts 100000 is not usable: expected 1 to "),
        (["--tokens", "1"], b"", "--tokens 1 is not usable: expected 2 or more"),
    ],
)
def test_the_comparison_says_what_is_missing(
    words: list[str], page: bytes | None, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        server.page = page  # type: ignore[attr-defined]
        Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        if page is None:
            server.shutdown()
            server.server_close()
        assert main(["bench", "--url", f"http://127.0.0.1:{port}/", *words]) == 2
        server.shutdown()
    said = capsys.readouterr()
    assert said.err.startswith("lynx-learn: ")
    assert line in said.err
    assert said.err.count("\n") == 1
    assert not said.out
