"""``mavis verify --url``: whether a server steers as it should, and what it costs."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from ..core.weights import weights_text
from .checks import PROMPTS, Check

_SIDE_BY_SIDE = 8  # requests of the timing
_ROUNDS = 3
_TIMEOUT = 600.0  # seconds
_DEFAULT_BETA = 5.0
Answer = tuple[str, list[float]]


def verify_server(
    url: str, weights: Mapping[str, float] | None, beta: float | None, tokens: int = 24
) -> tuple[list[str], list[Check]]:
    """Look at a server that answers chat completions.

    Args:
        url: of the server, with or without `/v1`.
        weights, beta: that steer; None for what the server has by default.
        tokens: of an answer.

    Returns:
        what was looked at, and the checks; the last one, of the time, always passes.

    Raises:
        OSError: there is no server.
        ValueError: it refuses the weights, or answers what no such server answers.
    """
    server = _Server(url, tokens)
    asked: dict[str, Any] = {} if weights is None else {"mavis_weights": weights_text(weights)}
    asked |= {"mavis_beta": float(beta)} if beta is not None else {} if asked else {"mavis_beta": _DEFAULT_BETA}
    plain = server.answers([{}] * len(PROMPTS))
    steered = server.answers([asked] * len(PROMPTS))
    zero = server.answers([asked | {"mavis_beta": 0.0}] * len(PROMPTS))
    among = server.answers([{}, asked, {}])
    checks = [_fires(plain, steered), _zero(plain, zero), _neighbours(plain, among), _refuses(server)]
    checks.append(_cost(server, asked))
    return [f"mavis verify: {server.model} at {server.url}", f"asked: {json.dumps(asked)}"], checks


class _Server:
    """The chat completions of one model, greedily."""

    def __init__(self, url: str, tokens: int) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.tokens = tokens
        try:
            models = self._json("/v1/models")["data"]
            self.model: str = models[0]["id"]
        except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.url} lists no model at /v1/models, as servers of OpenAI's kind do") from error

    def answers(self, asked: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """The texts, and the log-probabilities of their tokens, of requests that are under way at once."""
        with ThreadPoolExecutor(len(asked)) as pool:
            prompts = [PROMPTS[number % len(PROMPTS)] for number in range(len(asked))]
            return list(pool.map(self.answer, prompts, asked))

    def answer(self, prompt: str, asked: Mapping[str, Any]) -> Answer:
        """The text of one request.

        Raises:
            ValueError: the server refuses it; the message is the server's.
        """
        body: dict[str, Any] = {
            "model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0.0,
            "max_tokens": self.tokens, "logprobs": True,
        }  # fmt: skip
        if asked:
            body["vllm_xargs"] = dict(asked)
        try:
            choice = self._json("/v1/chat/completions", body)["choices"][0]
        except HTTPError as error:
            raise ValueError(f"the server answers {error.code}: {error.read(2000).decode(errors='replace')}") from error
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        return choice["message"]["content"], [token["logprob"] for token in logprobs]

    def _json(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=_TIMEOUT) as answer:
                return json.load(answer)
        except HTTPError:
            raise
        except URLError as error:
            raise OSError(f"no server answers at {self.url} ({error.reason}): start one with `mavis serve`") from error


def _fires(plain: Sequence[Answer], steered: Sequence[Answer]) -> Check:
    changed = sum(one[0] != other[0] for one, other in zip(plain, steered, strict=True))
    return Check("steering fires", changed > 0, f"{changed} of {len(plain)} greedy answers differ")


def _zero(plain: Sequence[Answer], zero: Sequence[Answer]) -> Check:
    same = sum(one[0] == other[0] for one, other in zip(plain, zero, strict=True))
    return Check("strength 0 is the model itself", same == len(plain), f"{same} of {len(plain)} greedy answers equal")


def _neighbours(plain: Sequence[Answer], among: Sequence[Answer]) -> Check:
    """Of a batch whose second request alone is steered: the others are as they were."""
    same = all(plain[place][0] == among[place][0] for place in (0, 2))
    pairs = [pair for place in (0, 2) for pair in zip(plain[place][1], among[place][1], strict=False)]
    off = max((abs(one - other) for one, other in pairs), default=0.0)
    told = (
        f"requests beside a steered one are {'the same' if same else 'others'}, log-probabilities differ by {off:.1e}"
    )
    return Check("neighbours in a batch are untouched", same, told)


def _refuses(server: _Server) -> Check:
    try:
        server.answer(PROMPTS[0], {"mavis_weights": "no objective of this name=1"})
    except ValueError as error:
        return Check("bad requests are refused", "answers 400" in str(error), str(error)[:160])
    return Check("bad requests are refused", False, "a request with an unknown objective was answered")


def _cost(server: _Server, asked: Mapping[str, Any]) -> Check:
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * _ROUNDS + 2):
        steered = turn % 2 == 1
        started = time.perf_counter()
        server.answers([asked if steered else {}] * _SIDE_BY_SIDE)
        if turn > 1:  # the first of each warms up
            times[steered].append(time.perf_counter() - started)
    plain, ours = (statistics.median(times[side]) for side in (False, True))
    told = f"{ours / plain:.2f} times unsteered: {plain:.2f} s and {ours:.2f} s for {_SIDE_BY_SIDE} requests"
    return Check(f"time, {_SIDE_BY_SIDE} at once", True, told)
