"""The comparison of a server with itself."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from lynx_learn.cli import main


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
