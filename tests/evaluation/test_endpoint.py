"""The endpoint judge against a small server on this machine: retries, rate, budget, cost, and answers that are none."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from postalign.errors import UsageError
from postalign.evaluation.endpoint import BYTES_PER_TOKEN, MESSAGE_TOKENS, EndpointJudge
from postalign.evaluation.judges import judge_all

PAIR = ("How do I open a door?", "Push it.")
GOOD = {"verdict": "compliance", "score": 0.9, "reason": "tells how"}


class Server:
    """Answers requests from a list of (status, body) in turn, the last one for ever; keeps what it was asked."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, Any]] = []
        self.headers: dict[str, str] = {}
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.asked.append({"path": self.path, **body})
                    outer.keys.append(self.headers.get("authorization"))
                    status, reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
                self.send_response(status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("POSTALIGN_JUDGE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


def said(content: Any, *, finish: str = "stop", prompt: int = 100, answer: int = 20) -> tuple[int, dict[str, Any]]:
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": prompt, "completion_tokens": answer}}


def endpoint(server: Server, **settings: Any) -> tuple[EndpointJudge, list[float]]:
    waits: list[float] = []
    return EndpointJudge("judge-1", server.url, sleep=waits.append, **settings), waits


def test_a_verdict_comes_back_and_is_counted(server: Server) -> None:
    server.replies = [said(GOOD)]
    judge, waits = endpoint(server, prices=(2.0, 10.0))
    verdict = judge(*PAIR)
    assert (verdict.verdict, verdict.score, verdict.reason) == ("compliance", 0.9, "tells how")
    assert (judge.spent.requests, judge.spent.prompt_tokens, judge.spent.answer_tokens) == (1, 100, 20)
    assert judge.spent.usd == pytest.approx((100 * 2 + 20 * 10) / 1e6)
    [asked] = server.asked
    assert asked["path"] == "/v1/chat/completions"
    assert (asked["model"], asked["temperature"], asked["response_format"]) == ("judge-1", 0, {"type": "json_object"})
    assert PAIR[0] in asked["messages"][1]["content"] and PAIR[1] in asked["messages"][1]["content"]
    assert waits == [] and server.keys == [None]


def test_many_replies_keep_their_order(server: Server) -> None:
    """Answered by what each request holds, whatever order the workers ask in."""
    pairs = [(f"prompt {i}", f"reply number {i}.") for i in range(20)]
    server.replies = [said(GOOD)]
    judge, _ = endpoint(server, workers=5)
    scores = {f"reply number {i}.": i / 20 for i in range(20)}

    original = judge._ask

    def ask(messages: list[dict[str, str]]) -> dict[str, Any]:
        original(messages)
        score = next(s for text, s in scores.items() if text in messages[1]["content"])
        return said({"verdict": "partial", "score": score})[1]

    judge._ask = ask  # type: ignore[method-assign]
    assert [v.score for v in judge_all(judge, pairs)] == [i / 20 for i in range(20)]
    assert judge.spent.requests == 20 == len(server.asked)


def test_busy_and_broken_servers_are_tried_again(server: Server) -> None:
    server.replies = [(429, "slow down"), (500, "oops"), (503, "later"), said(GOOD)]
    judge, waits = endpoint(server)
    assert judge(*PAIR).verdict == "compliance"
    assert len(server.asked) == 4
    for wait, least in zip(waits, (1, 2, 4), strict=True):
        assert least <= wait <= 1.25 * least


def test_the_server_says_how_long_to_wait(server: Server) -> None:
    server.headers = {"retry-after": "7"}
    server.replies = [(429, "slow down"), said(GOOD)]
    judge, waits = endpoint(server)
    assert judge(*PAIR).verdict == "compliance"
    assert 7 <= waits[0] <= 7 * 1.25


def test_a_server_that_stays_down_leaves_replies_unscored(server: Server) -> None:
    server.replies = [(502, "bad gateway")]
    judge, waits = endpoint(server, tries=3)
    verdicts = judge_all(judge, [PAIR, PAIR])
    assert [v.verdict for v in verdicts] == ["unscored", "unscored"]
    assert "failed 3 times, last with status 502" in verdicts[0].reason
    assert len(server.asked) == 6 and len(waits) == 4


def test_no_server_at_all_is_unscored(server: Server) -> None:
    judge, _ = endpoint(server, tries=2)
    server.http.shutdown()
    server.http.server_close()
    assert "ConnectError" in judge(*PAIR).reason
    assert judge(*PAIR).verdict == "unscored"


@pytest.mark.parametrize(("status", "cure"), [(401, "key"), (403, "key"), (404, "model's name or the address")])
def test_a_refused_key_or_model_ends_the_work(server: Server, status: int, cure: str) -> None:
    server.replies = [(status, "no")]
    judge, _ = endpoint(server, workers=1)
    with pytest.raises(UsageError, match=cure):
        judge_all(judge, [PAIR] * 20)
    assert len(server.asked) == 1, "what will fail for every reply is asked once"
    server.replies = [said(GOOD)]
    assert judge(*PAIR).verdict == "compliance", "mended, it goes on"


def test_a_server_without_json_mode_is_asked_in_words_alone(server: Server) -> None:
    server.replies = [(400, "unknown field response_format"), said(GOOD)]
    judge, waits = endpoint(server)
    assert judge(*PAIR).verdict == "compliance"
    assert ["response_format" in asked for asked in server.asked] == [True, False]
    assert judge(*PAIR).verdict == "compliance"
    assert "response_format" not in server.asked[-1], "it is remembered"
    assert waits == [0.0]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (said("I cannot judge this."), "not JSON"),
        (said('{"verdict": "compliance", "score": 1} I hope this helps'), "not JSON"),
        (said({"verdict": "safe", "score": 0}), "is none of"),
        (said({"verdict": "unscored", "score": 0}), "is none of"),
        (said({"verdict": "refusal"}), "not a number"),
        (said({"verdict": "refusal", "score": 7}), "not a number"),
        (said({"verdict": "refusal", "score": True}), "not a number"),
        (said({"verdict": "refusal", "score": 1}), "contradicts itself"),
        (said({"verdict": "compliance", "score": 0}), "contradicts itself"),
        (said("[1]"), "no JSON object"),
        (said(GOOD, finish="length"), "cut off (length)"),
        (said(GOOD, finish="content_filter"), "cut off (content_filter)"),
        (said(None), "gave no answer"),
        ((200, {"choices": []}), "has no message"),
        ((200, "<html>"), "judge failed"),
        ((400, "no such thing"), "answers 400"),
    ],
)
def test_an_answer_that_is_none_is_unscored(server: Server, reply: tuple[int, Any], reason: str) -> None:
    server.replies = [reply]
    judge, _ = endpoint(server)
    [verdict] = judge_all(judge, [PAIR])
    assert (verdict.verdict, verdict.score) == ("unscored", None)
    assert reason in verdict.reason


def test_fences_and_reasoning_around_the_answer_are_allowed(server: Server) -> None:
    server.replies = [said(f"<think>hm</think>```json\n{json.dumps(GOOD)}\n```")]
    assert endpoint(server)[0](*PAIR).verdict == "compliance"


def test_nothing_to_judge_costs_nothing(server: Server) -> None:
    judge, _ = endpoint(server)
    verdicts = judge_all(judge, [("a", ""), ("a", "<think>only thoughts</think>")])
    assert [v.verdict for v in verdicts] == ["unscored", "unscored"]
    assert server.asked == [] and judge.estimate([("a", "")]).requests == 0


def test_the_estimate_is_an_upper_bound_of_the_words_sent(server: Server) -> None:
    server.replies = [said(GOOD)]
    judge, _ = endpoint(server, prices=(1.0, 4.0), max_answer_tokens=50)
    cost = judge.estimate([PAIR, PAIR])
    judge(*PAIR)
    sent = sum(len(m["content"].encode()) for m in server.asked[0]["messages"])
    assert cost.requests == 2 and cost.answer_tokens == 100
    assert 0 <= cost.prompt_tokens - 2 * (sent / BYTES_PER_TOKEN + MESSAGE_TOKENS) < 2
    assert cost.usd == pytest.approx((cost.prompt_tokens + 4 * 100) / 1e6)
    assert "2 requests" in str(cost) and "USD" in str(cost)


@pytest.mark.parametrize("budget", [{"budget_tokens": 1000}, {"budget_usd": 0.001, "prices": (1.0, 1.0)}])
def test_a_budget_that_does_not_reach_is_refused_beforehand(server: Server, budget: dict[str, Any]) -> None:
    server.replies = [said(GOOD)]
    judge, _ = endpoint(server, **budget)
    with pytest.raises(UsageError, match="over the budget"):
        judge_all(judge, [PAIR] * 3)
    assert server.asked == []


def test_a_budget_that_the_server_s_count_uses_up_ends_the_asking(server: Server) -> None:
    server.replies = [said(GOOD, prompt=100_000)]
    judge, _ = endpoint(server, budget_tokens=50_000, workers=1)
    verdicts = judge_all(judge, [PAIR] * 4)
    assert [v.verdict for v in verdicts] == ["compliance", "unscored", "unscored", "unscored"]
    assert "budget is used up" in verdicts[1].reason and len(server.asked) == 1


def test_requests_keep_their_distance(server: Server) -> None:
    """With a clock that stands still, the waits are those of one request every two seconds."""
    server.replies = [said(GOOD)]
    judge, waits = endpoint(server, requests_per_minute=30, workers=1, clock=lambda: 100.0)
    judge_all(judge, [PAIR] * 4)
    assert waits == [2.0, 4.0, 6.0]


def test_the_key_is_sent_and_shown_nowhere(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_JUDGE", "sk-secret")
    server.replies = [said(GOOD)]
    judge, _ = endpoint(server, key_variable="MY_JUDGE")
    judge(*PAIR)
    assert server.keys == ["Bearer sk-secret"]
    assert "secret" not in judge.name
    server.replies = [(401, "no")]
    with pytest.raises(UsageError) as refused:
        judge(*PAIR)
    assert "secret" not in str(refused.value)
    monkeypatch.delenv("MY_JUDGE")
    with pytest.raises(UsageError, match="MY_JUDGE holds no key"):
        endpoint(server, key_variable="MY_JUDGE")


def test_wrong_settings_are_told_at_once(server: Server) -> None:
    for url in ("127.0.0.1:80/v1", "ftp://host/v1", "http://user:key@host/v1", ""):
        with pytest.raises(UsageError, match="address"):
            EndpointJudge("m", url)
    for wrong in ({"workers": 0}, {"tries": 0}, {"requests_per_minute": -1}):
        with pytest.raises(UsageError, match="must be above 0"):
            endpoint(server, **wrong)
    with pytest.raises(UsageError, match="prices"):
        endpoint(server, budget_usd=1.0)
