"""The `endpoint` judge: any OpenAI-compatible server, asked with a rubric.

Knows one request (`/chat/completions`), when to try it again, how fast to ask, and what it costs: the cost is estimated
before the first request and refused when it is over the budget. The key comes from an environment variable and is
written nowhere. What could not be judged is `unscored`. The words are the rubric's (rubric.py).
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import PostalignError, UsageError
from .judges import Pair, Verdict, failed, without_reasoning, wordless
from .rubric import load_rubric, read_answer

KEYS = ("POSTALIGN_JUDGE_API_KEY", "OPENAI_API_KEY")
BYTES_PER_TOKEN = 3.0  # English has about four, other scripts fewer: an estimate that is rather too high
MESSAGE_TOKENS = 16  # roles and separators of a request
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
LONGEST_WAIT = 60.0  # seconds


@dataclass(frozen=True)
class Cost:
    """Requests and tokens, and US dollars where prices are known. Of an estimate `answer_tokens` is the most there can
    be.
    """

    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    usd: float | None = None

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens

    def __str__(self) -> str:
        money = "" if self.usd is None else f", {self.usd:.4f} USD"
        return f"{self.requests} requests, {self.prompt_tokens} + {self.answer_tokens} tokens{money}"


class EndpointJudge:
    """model: as the server names it; base_url: up to and with `/v1`. key_variable: the environment variable of the key;
    default the first of `KEYS` that is set, none for a server without keys. prices: USD for a million prompt tokens and
    a million answer tokens. budget_tokens, budget_usd: most that this judge may use in all; more is refused
    beforehand. requests_per_minute: of all `workers` together. tries: of one request. json_mode: ask the server for
    JSON (`response_format`); left out by itself where the server does not know it. `spent` is what was used so far.
    """

    tells = "refusal"

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        rubric: str | Path = "refusal",
        key_variable: str | None = None,
        prices: tuple[float, float] | None = None,
        budget_tokens: int | None = None,
        budget_usd: float | None = None,
        requests_per_minute: float | None = None,
        workers: int = 4,
        tries: int = 5,
        timeout: float = 60.0,
        max_answer_tokens: int = 256,
        json_mode: bool = True,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise UsageError(f"the judge's address must read http(s)://host/v1, without a key in it, not {base_url!r}.")
        if min(workers, tries, max_answer_tokens, timeout) <= 0 or (requests_per_minute or 1) <= 0:
            raise UsageError("workers, tries, timeout, max_answer_tokens and requests_per_minute must be above 0.")
        if budget_usd is not None and prices is None:
            raise UsageError("a budget in USD needs prices=(per million prompt tokens, per million answer tokens).")
        self.model, self.base_url, self.rubric = model, base_url.rstrip("/"), load_rubric(rubric)
        self.name = f"endpoint:{model}@{self.base_url}#{self.rubric.name}-{self.rubric.version}"
        self.prices, self.budget_tokens, self.budget_usd = prices, budget_tokens, budget_usd
        self.tries, self.workers, self.max_answer_tokens = tries, workers, max_answer_tokens
        self.spent = Cost(usd=None if prices is None else 0.0)
        self._key, self._json_mode, self._sleep, self._clock = _key(key_variable), json_mode, sleep, clock
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()
        self._refused: UsageError | None = None  # by the server, for good: the other workers stop as well
        self._http, self._client = _http(timeout)

    def __call__(self, prompt: str, response: str, /) -> Verdict:
        return self.batch([(prompt, response)])[0]

    def batch(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Verdicts in order. Raises UsageError, before the first request, when the estimate is over what is left of
        the budget, and when the server refuses the key, the model or the address.
        """
        self.check_budget(pairs)
        self._refused = None
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda pair: self._judge(*pair), pairs))

    def estimate(self, pairs: Sequence[Pair]) -> Cost:
        """What `batch(pairs)` may cost at most, by the length of the texts, without asking anyone."""
        texts = [(prompt, response, without_reasoning(response)) for prompt, response in pairs]
        asked = [self.rubric.messages(prompt, text) for prompt, response, text in texts if not wordless(response, text)]
        sizes = [sum(len(m["content"].encode()) for m in messages) for messages in asked]
        prompt = sum(math.ceil(size / BYTES_PER_TOKEN) + MESSAGE_TOKENS for size in sizes)
        return self._priced(len(asked), prompt, len(asked) * self.max_answer_tokens)

    def check_budget(self, pairs: Sequence[Pair]) -> Cost:
        """The estimate. Raises UsageError when it is over what is left of the budget."""
        cost, spent = self.estimate(pairs), self.spent
        over = None
        if self.budget_tokens is not None and spent.tokens + cost.tokens > self.budget_tokens:
            over = f"{self.budget_tokens} tokens ({spent.tokens} used)"
        if self.budget_usd is not None and (spent.usd or 0.0) + (cost.usd or 0.0) > self.budget_usd:
            over = f"{self.budget_usd:g} USD ({spent.usd or 0.0:.4f} used)"
        if over:
            raise UsageError(f"judging may take {cost}, over the budget of {over}: raise it or judge fewer replies.")
        return cost

    def _judge(self, prompt: str, response: str) -> Verdict:
        text = without_reasoning(response)
        early = wordless(response, text)
        if early is not None:
            return early
        if self._refused is not None:
            raise self._refused
        if self._used_up():  # the estimate was too low, which the server's own count tells
            return Verdict("unscored", "the judge's budget is used up")
        try:
            return self._read(self._ask(self.rubric.messages(prompt, text)))
        except UsageError as error:
            self._refused = error
            raise
        except Exception as error:  # one reply's failure is counted, and does not end the others
            return failed(error)

    def _ask(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The server's answer, after as many tries as it takes. Raises PostalignError when none succeeds, UsageError
        when none can.
        """
        reason, asked_wait = "", None
        for attempt in range(self.tries):
            if attempt:
                self._sleep(self._wait(attempt, asked_wait))
            self._pace()
            asked_wait = None
            json_mode = self._json_mode
            body: dict[str, Any] = {"model": self.model, "messages": messages, "temperature": 0}
            body["max_tokens"] = self.max_answer_tokens
            if json_mode:
                body["response_format"] = {"type": "json_object"}
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            try:
                reply = self._client.post(f"{self.base_url}/chat/completions", json=body, headers=headers)
            except self._http.TransportError as error:
                reason = f"{type(error).__name__}"
                continue
            if reply.status_code == 200:
                return reply.json()
            reason = f"status {reply.status_code}"
            if reply.status_code == 400 and json_mode and "response_format" in reply.text:
                self._json_mode, asked_wait = False, "0"  # the server does not know it: ask in words alone, at once
                continue
            if reply.status_code in (401, 403, 404):
                cure = "is the model's name or the address right?" if reply.status_code == 404 else "is the key right?"
                raise UsageError(f"the judge at {self.base_url} answers {reply.status_code} for {self.model!r}: {cure}")
            if reply.status_code not in AGAIN:
                raise PostalignError(f"the judge's server answers {reply.status_code}")
            asked_wait = reply.headers.get("retry-after")
        raise PostalignError(f"the judge's server failed {self.tries} times, last with {reason}")

    def _wait(self, attempt: int, asked: str | None) -> float:
        """Seconds before try number `attempt`: what the server asked for, else 1, 2, 4 ... with some noise."""
        try:
            seconds = float(asked) if asked else 2.0 ** (attempt - 1)
        except ValueError:  # an HTTP date
            seconds = 2.0 ** (attempt - 1)
        noise = 1 + 0.25 * random.random()  # so that workers do not come back all at once; decides no verdict
        return min(LONGEST_WAIT, max(0.0, seconds)) * noise

    def _pace(self) -> None:
        """Wait for this request's turn."""
        if self._interval:
            with self._lock:
                now = self._clock()
                turn = max(now, self._next)
                self._next = turn + self._interval
            if turn > now:
                self._sleep(turn - now)

    def _read(self, reply: dict[str, Any]) -> Verdict:
        self._count(reply.get("usage") or {})
        try:
            choice = reply["choices"][0]
            text, why = choice["message"]["content"], choice.get("finish_reason")
        except (LookupError, TypeError) as error:
            raise PostalignError("the server's answer has no message") from error
        if why in ("length", "content_filter"):
            return Verdict("unscored", f"the judge's answer was cut off ({why})")
        if not isinstance(text, str) or not text.strip():
            return Verdict("unscored", "the judge gave no answer")
        return read_answer(without_reasoning(text))

    def _used_up(self) -> bool:
        tokens, usd, spent = self.budget_tokens, self.budget_usd, self.spent
        return (tokens is not None and spent.tokens >= tokens) or (usd is not None and (spent.usd or 0) >= usd)

    def _count(self, usage: dict[str, Any]) -> None:
        prompt, answer = (int(usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens"))
        with self._lock:
            old = self.spent
            self.spent = self._priced(old.requests + 1, old.prompt_tokens + prompt, old.answer_tokens + answer)

    def _priced(self, requests: int, prompt: int, answer: int) -> Cost:
        usd = None if self.prices is None else (prompt * self.prices[0] + answer * self.prices[1]) / 1e6
        return Cost(requests, prompt, answer, usd)


def _key(variable: str | None) -> str | None:
    if variable is None:
        return next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
    if not os.environ.get(variable):
        raise UsageError(f"the environment variable {variable} holds no key: set it, or leave key_variable out.")
    return os.environ[variable]


def _http(timeout: float) -> tuple[Any, Any]:
    """(the client library, a client). huggingface-hub needs it too: httpx before its version 2, httpx2 since."""
    try:
        import httpx2 as http
    except ImportError:
        try:
            import httpx as http  # type: ignore[import-not-found, no-redef]
        except ImportError as error:
            raise PostalignError("the endpoint judge needs an HTTP client: pip install httpx.") from error
    return http, http.Client(timeout=timeout)
