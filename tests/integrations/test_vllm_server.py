"""`mavis serve` with SmolLM2 and the shipped head, asked by the `openai` client. Run with `make test-vllm`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from mavis_logits.commands.verify_server import verify_server

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parents[2]
QUESTION = [{"role": "user", "content": "How do I make good tea?"}]
OURS = ["--", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server that is up; it ends with the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-m", "mavis_logits.cli", "serve", "--port", str(port), *OURS]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 2400
        while not _is_up(port):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(2)
        assert "mavis: steering by values of helpful" in log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def _is_up(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=1200)


def ask(client: Any, asked: dict[str, Any]) -> str:
    answer = client.chat.completions.create(
        model="HuggingFaceTB/SmolLM2-135M-Instruct", messages=QUESTION, max_tokens=16, temperature=0.0,
        extra_body={"vllm_xargs": asked} if asked else None,
    )  # fmt: skip
    return str(answer.choices[0].message.content)


def test_the_openai_client_steers(client: Any) -> None:
    plain = ask(client, {})
    steered = ask(client, {"mavis_weights": "humour=0.7,formal=-0.3", "mavis_beta": 8.0})
    assert steered != plain
    weights = json.dumps({"humour": 0.7, "formal": -0.3})
    assert ask(client, {"mavis_weights": weights, "mavis_beta": 8.0}) == steered
    assert ask(client, {}) == plain


def test_a_bad_request_gets_400_and_the_server_lives(client: Any) -> None:
    import openai

    for asked in ({"mavis_weights": "humor=1"}, {"mavis_beta": "much"}, {"mavis_top_k": 10**6}, {"mavis_betta": 1}):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, asked)
        assert caught.value.status_code == 400
    with pytest.raises(openai.BadRequestError, match="did you mean 'humour'"):
        ask(client, {"mavis_weights": "humor=1"})
    assert ask(client, {})


def test_verify_passes_and_the_counters_are_in_the_endpoint(url: str) -> None:
    _, checks = verify_server(url, {"humour": 1.0}, 8.0, tokens=12)
    assert all(check.passed for check in checks), checks
    time.sleep(6)
    verify_server(url, {"humour": 1.0}, 8.0, tokens=2)  # counters are brought up to date by steps
    with urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    counted = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("mavis:")}
    assert counted["mavis:rows_steered_total"] > 12
    assert counted["mavis:kl_nats_total"] > 0
    assert counted["mavis:rows_ended_total"] == 0
