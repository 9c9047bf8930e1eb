"""A judge's endpoint for tests: OpenAI's chat API on this machine, and a model that follows a rule."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def served(reply: Callable[[str, str, str], str]) -> Iterator[tuple[str, list[str]]]:
    """An endpoint whose model "umpire" says what `reply` makes of a question and two answers; and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.say({"object": "list", "data": [{"id": "umpire", "object": "model"}]})

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = sent["messages"][-1]["content"]
            asked.append(text)
            parts = re.fullmatch(
                r"Criterion: .*\n\nQuestion:\n(.*)\n\nAnswer A:\n(.*)\n\nAnswer B:\n(.*)\n\nA, B or tie\?",
                text, re.DOTALL,
            )  # fmt: skip
            said = {"role": "assistant", "content": reply(*parts.groups())}
            self.say({"id": "0", "object": "chat.completion", "choices": [{"index": 0, "message": said}]})

        def say(self, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *rest: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def longer(_question: str, first: str, second: str) -> str:
    return "tie" if len(first) == len(second) else "AB"[len(second) > len(first)]
