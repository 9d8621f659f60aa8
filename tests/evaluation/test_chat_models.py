"""Chat models as writers and checkers: a tiny local one, and a server that lives in the test."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch

from postalign.errors import PostalignError, UsageError
from postalign.evaluation.chat_models import EndpointChat, LocalChat, open_chat
from postalign.models.chat import encode, token_ids


def test_a_local_model_writes_by_seed_and_place(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    chat = LocalChat(tiny_llama, tiny_tokenizer, "tiny", batch_size=1)
    settings = {"max_new_tokens": 5, "temperature": 1.0}
    one = chat.write(["Hi", "Hi"], seed=1, **settings)
    assert one[0] != one[1], "each place has a stream of its own"
    assert LocalChat(tiny_llama, tiny_tokenizer, "tiny").write(["Hi", "Hi"], seed=1, **settings) == one
    assert chat.write(["Hi", "Hi"], seed=2, **settings) != one


def test_yes_is_a_share_of_the_next_token(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    (found,) = LocalChat(tiny_llama, tiny_tokenizer, "tiny").yes(["Is fire hot?"])
    with torch.no_grad():
        p = tiny_llama(encode(tiny_tokenizer, ["Is fire hot?"]).input_ids).logits[0, -1].softmax(-1)
    mass = []
    for forms in (("Yes", "yes", "YES"), ("No", "no", "NO")):  # this tokenizer parts the space from the word
        mass.append(sum(float(p[i]) for i in {token_ids(tiny_tokenizer, f, beginning=False)[0] for f in forms}))
    assert sum(mass) > 0.01 and found == pytest.approx(mass[0] / sum(mass), abs=1e-5)
    assert 0 < found < 1


def test_a_model_that_says_neither_is_not_counted_as_no(
    tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from postalign import decoding

    def sure(*_: Any) -> Any:
        scores = torch.full((1, 384), -20.0)
        scores[0, 7] = 0.0
        return [(scores, torch.tensor([0]))]

    monkeypatch.setattr(decoding, "next_token_log_probs", sure)
    assert LocalChat(tiny_llama, tiny_tokenizer, "tiny").yes(["a", "b"]) == [None, None]


class Server(HTTPServer):
    """Answers with what `replies` holds for a prompt; statuses in `busy` come first, one each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: dict[str, Any] = {}
        self.busy: list[int] = []
        self.seen: list[tuple[dict[str, Any], str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((body, self.headers.get("Authorization")))
        status = self.server.busy.pop(0) if self.server.busy else 200
        prompt = body["messages"][0]["content"]
        choice = self.server.replies.get(prompt, {"message": {"content": f"reply to {prompt}"}})
        answer = b"<html>" if choice == "broken" else json.dumps({"choices": [choice]}).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("POSTALIGN_API_KEY", "OPENAI_API_KEY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    here = Server()
    thread = threading.Thread(target=here.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield here
    here.shutdown()
    here.server_close()
    thread.join()


def chances(**p: float) -> dict[str, Any]:
    top = [{"token": token, "logprob": math.log(value)} for token, value in p.items()]
    return {"message": {"content": "?"}, "logprobs": {"content": [{"token": "?", "top_logprobs": top}]}}


def test_a_server_writes_in_the_prompts_order(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTALIGN_API_KEY", "k")
    chat = open_chat(f"{server.url}#some-model", lambda name: pytest.fail("no model is loaded for a URL"))
    prompts = [f"p{i}" for i in range(9)]
    written = chat.write(prompts, seed=5, max_new_tokens=7, temperature=0.5)
    assert written == [f"reply to {prompt}" for prompt in prompts]
    assert chat.name == "some-model (endpoint)"
    body = next(body for body, _ in server.seen if body["messages"][0]["content"] == "p3")
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("some-model", 7, 0.5, 8)
    assert {key for _, key in server.seen} == {"Bearer k"}


def test_a_server_says_how_surely_yes(server: Server) -> None:
    server.replies = {
        "a": chances(Yes=0.6, No=0.1, yes=0.1, Maybe=0.2),
        "b": chances(Perhaps=0.9, Well=0.1),
        "c": {"message": {"content": " Yes, it would."}},
        "d": {"message": {"content": "No."}},
        "e": {"message": {"content": "It depends"}},
        "f": {"message": {"content": None}},
    }
    found = EndpointChat(server.url, "m").yes(list("abcdef"))
    assert found == [pytest.approx(0.7 / 0.8), None, 1.0, 0.0, None, None]


def test_busy_answers_are_tried_again_ever_later(server: Server) -> None:
    server.busy = [429, 503]
    waits: list[float] = []
    chat = EndpointChat(server.url, "m", sleep=waits.append)
    assert chat.write(["p"], seed=0, max_new_tokens=1, temperature=1.0) == ["reply to p"]
    assert waits == [2.0, 4.0]
    server.busy = [500] * 9
    with pytest.raises(PostalignError, match=r"did not answer in 3 tries \(HTTP 500\)"):
        EndpointChat(server.url, "m", tries=3, sleep=waits.append).yes(["p"])


@pytest.mark.parametrize(
    ("status", "message"), [(401, "set POSTALIGN_API_KEY"), (404, "check the URL and the model 'm'")]
)
def test_what_no_repetition_mends_is_an_error_at_once(server: Server, status: int, message: str) -> None:
    server.busy = [status]
    with pytest.raises(PostalignError, match=message) as caught:
        EndpointChat(server.url, "m").yes(["p"])
    assert len(server.seen) == 1 and "\n" not in str(caught.value)


def test_other_servers_and_none(server: Server) -> None:
    server.replies = {"p": "broken"}
    with pytest.raises(PostalignError, match="OpenAI-compatible"):
        EndpointChat(server.url, "m").yes(["p"])
    nowhere = EndpointChat("http://127.0.0.1:9/v1", "m", tries=2, sleep=lambda seconds: None)
    with pytest.raises(PostalignError, match="check that it is up"):
        nowhere.yes(["p"])
    with pytest.raises(UsageError, match="#MODEL"):
        open_chat(server.url, lambda name: (None, None))
    assert open_chat("tiny", lambda name: (name, "tokenizer")).name == "tiny"
