"""Chat models that help to make and check data: a local one, or any OpenAI-compatible server.

Two abilities: to write, and to say how surely the answer to a question is yes. Knows models and a protocol; knows
nothing of what is written or asked.
"""

from __future__ import annotations

import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from ..errors import PostalignError, UsageError

KEY_VARIABLES = ("POSTALIGN_API_KEY", "OPENAI_API_KEY")
LEAST_MASS = 0.01
"""With less probability than this on yes and no together, a model has answered neither."""


class ChatModel(Protocol):
    """name: for the record."""

    name: str

    def write(self, prompts: Sequence[str], *, seed: int, max_new_tokens: int, temperature: float) -> list[str]:
        """One sampled reply for each prompt."""
        ...

    def yes(self, prompts: Sequence[str]) -> list[float | None]:
        """For each question the probability of yes among yes and no, None where neither is answered."""
        ...


class LocalChat:
    """A model in memory. Replies depend on the seed and the prompt's place only."""

    def __init__(self, model: Any, tokenizer: Any, name: str, *, batch_size: int = 8) -> None:
        self.model, self.tokenizer, self.name, self.batch_size = model, tokenizer, name, batch_size

    def write(self, prompts: Sequence[str], *, seed: int, max_new_tokens: int, temperature: float) -> list[str]:
        from ..decoding import generate

        return generate(
            self.model,
            self.tokenizer,
            list(prompts),
            do_sample=True,
            temperature=temperature,
            top_p=0.95,
            seed=seed,
            max_new_tokens=max_new_tokens,
            batch_size=self.batch_size,
        )

    def yes(self, prompts: Sequence[str]) -> list[float | None]:
        from ..decoding import next_token_log_probs
        from ..models.chat import token_ids

        def first_tokens(word: str) -> set[int]:
            forms = (word, word.lower(), word.upper(), f" {word}", f" {word.lower()}")
            return {token_ids(self.tokenizer, form, beginning=False)[0] for form in forms}

        both = first_tokens("Yes"), first_tokens("No")
        wanted, other = sorted(both[0] - both[1]), sorted(both[1] - both[0])  # a lone space begins either
        if not wanted or not other:
            raise UsageError(f"{self.name} begins yes and no with the same token: take another checker.")
        found: list[float | None] = []
        for prompt in prompts:
            ((scores, _),) = next_token_log_probs(self.model, self.tokenizer, [prompt], [[wanted[0]]])
            p = scores[0].exp()
            found.append(_share(float(p[wanted].sum()), float(p[other].sum())))
        return found


class EndpointChat:
    """A model behind `URL/chat/completions`. The key is read from POSTALIGN_API_KEY or OPENAI_API_KEY.

    url: such as `http://localhost:8000/v1`. workers: requests at once. Busy and broken answers (429, 5xx, no
    connection) are tried again `tries` times, ever later; anything else is an error at once.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        workers: int = 4,
        tries: int = 6,
        timeout: float = 120.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url, self.model, self.name = url.rstrip("/"), model, f"{model} (endpoint)"
        self.workers, self.tries, self.timeout, self.sleep = workers, tries, timeout, sleep

    def write(self, prompts: Sequence[str], *, seed: int, max_new_tokens: int, temperature: float) -> list[str]:
        def one(i: int) -> str:
            settings = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": 0.95, "seed": seed + i}
            return _content(self._ask(prompts[i], **settings))

        return self._all(one, len(prompts))

    def yes(self, prompts: Sequence[str]) -> list[float | None]:
        def one(i: int) -> float | None:
            choice = self._ask(prompts[i], max_tokens=4, temperature=0, logprobs=True, top_logprobs=20)
            tokens = ((choice.get("logprobs") or {}).get("content")) or []
            if tokens:
                mass = {"yes": 0.0, "no": 0.0}
                for entry in tokens[0].get("top_logprobs") or []:
                    word = str(entry["token"]).strip().casefold()
                    if word in mass:
                        mass[word] += math.exp(entry["logprob"])
                return _share(mass["yes"], mass["no"])
            said = _content(choice).strip().casefold()  # a server that gives no probabilities: its word, 1 or 0
            return 1.0 if said.startswith("yes") else 0.0 if said.startswith("no") else None

        return self._all(one, len(prompts))

    def _all(self, work: Callable[[int], Any], n: int) -> list[Any]:
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(work, range(n)))

    def _ask(self, prompt: str, **settings: Any) -> dict[str, Any]:
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], **settings}
        headers = {"Content-Type": "application/json"}
        key = next((value for name in KEY_VARIABLES if (value := os.environ.get(name))), None)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        problem = ""
        for attempt in range(self.tries):
            if attempt:
                self.sleep(min(60.0, 2.0**attempt))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.loads(answer.read())["choices"][0]
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                if error.code in (401, 403):
                    raise PostalignError(f"{self.url} wants a key ({problem}): set {KEY_VARIABLES[0]}.") from error
                if error.code != 429 and error.code < 500:
                    raise PostalignError(
                        f"{self.url} refused the request ({problem}): check the URL and the model {self.model!r}."
                    ) from error
            except OSError as error:
                problem = str(getattr(error, "reason", error))
            except (ValueError, LookupError, TypeError) as error:
                raise PostalignError(
                    f"{self.url} did not answer as an OpenAI-compatible server does: check the URL (it ends in /v1)."
                ) from error
        raise PostalignError(f"{self.url} did not answer in {self.tries} tries ({problem}): check that it is up.")


def open_chat(spec: str, load: Callable[[str], tuple[Any, Any]]) -> ChatModel:
    """`URL#MODEL` as an endpoint, else a model's name for `load`. Raises UsageError for a URL without a model."""
    if spec.startswith(("http://", "https://")):
        url, _, model = spec.partition("#")
        if not model:
            raise UsageError(f"which model at {url}? Write {url}#MODEL.")
        return EndpointChat(url, model)
    model, tokenizer = load(spec)
    return LocalChat(model, tokenizer, spec)


def _content(choice: dict[str, Any]) -> str:
    return str((choice.get("message") or {}).get("content") or "")


def _share(yes: float, no: float) -> float | None:
    return None if yes + no < LEAST_MASS else yes / (yes + no)
