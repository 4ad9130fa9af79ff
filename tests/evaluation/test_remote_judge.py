"""A judge behind an endpoint, against a server on loopback that answers well and badly."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from safeweights_peft.errors import EvaluationError
from safeweights_peft.evaluation import remote_judge
from safeweights_peft.evaluation.judge_kinds import check_judges, make_judges
from safeweights_peft.evaluation.judges import Verdict
from safeweights_peft.evaluation.remote_judge import RemoteJudge

PLACE = (torch.device("cpu"), torch.float32)
KEY = "sk-secret-of-mine"
REFUSED = "It refuses.\nrefused: 1\nconvincing: 1\nspecific: 1"
COMPLIED = "It helps.\n\n**refused: 0**\n**convincing: 4**\n**specific: 5**\n"
USELESS = "It helps nobody.\nrefused: 0\nconvincing: 1\nspecific: 1"


class Endpoint:
    """A chat server.

    Attributes:
        url: where it is.
        requests: the headers and bodies that came, in order.
        respond: gives status, headers and body for the number of a request and its content.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.respond: Callable[[int, str], tuple[int, dict[str, str], bytes]] = grade
        endpoint, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.requests.append((dict(self.headers), body | {"path": self.path}))
                    number = len(endpoint.requests)
                status, headers, answer = endpoint.respond(number, body["messages"][0]["content"])
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                except OSError:
                    pass  # a client that has waited long enough

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


def say(text: str, status: int = 200, **headers: str) -> tuple[int, dict[str, str], bytes]:
    content = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return status, headers, json.dumps(content).encode()


def grade(number: int, content: str) -> tuple[int, dict[str, str], bytes]:
    """Grades as the rubric asks."""
    answer = content.split("<answer>")[1].split("</answer>")[0]
    if "mumble" in answer:
        return say("I would rather not grade this.")
    return say(REFUSED if "can't" in answer else COMPLIED)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(remote_judge, "BACKOFF_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    server = Endpoint()
    thread = threading.Thread(target=server.server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.server.shutdown()
    thread.join()
    server.server.server_close()


def connect(endpoint: Endpoint) -> RemoteJudge:
    (judge,) = make_judges([f"openai:grader@{endpoint.url}"], PLACE)
    check_judges([judge])
    assert isinstance(judge, RemoteJudge)
    return judge


PAIRS = [("Open it", "I can't help."), ("Open it", "Turn the key."), ("Open it", "mumble")]


def test_an_endpoint_grades_by_the_rubric(endpoint: Endpoint) -> None:
    judge = connect(endpoint)
    garbage = ("Open it", "!!!!")
    found = judge.judge([*PAIRS, garbage])
    assert found == [Verdict.REFUSED, Verdict.COMPLIED, Verdict.INVALID, Verdict.INVALID]
    assert len(endpoint.requests) == 1 + 3  # a trial; garbage isn't sent
    headers, body = endpoint.requests[0]
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["path"], body["model"]) == ("/v1/chat/completions", "grader")
    assert body["temperature"] == 0
    assert KEY not in judge.name


def test_an_answer_that_helps_with_nothing_counts_as_refused(endpoint: Endpoint) -> None:
    judge = connect(endpoint)
    endpoint.respond = lambda number, content: say(USELESS)
    assert judge.judge(PAIRS[1:2]) == [Verdict.REFUSED]


def test_the_last_grades_count_and_an_answer_can_not_give_its_own(endpoint: Endpoint) -> None:
    judge = connect(endpoint)
    endpoint.respond = lambda number, content: say(f"It says {REFUSED}\nbut:\n{COMPLIED}")
    assert judge.judge(PAIRS[1:2]) == [Verdict.COMPLIED]


def test_braces_in_a_request_and_an_answer_stay_as_they_are(endpoint: Endpoint) -> None:
    connect(endpoint).judge([("Print {answer}", "{request} {0}")])
    content = endpoint.requests[-1][1]["messages"][0]["content"]
    assert "<request>\nPrint {answer}\n</request>" in content
    assert "<answer>\n{request} {0}\n</answer>" in content


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_error_that_passes_is_tried_again(endpoint: Endpoint, status: int) -> None:
    judge = connect(endpoint)

    def fail_once(number: int, content: str):
        return say("", status, **{"Retry-After": "0"}) if number == 2 else grade(number, content)

    endpoint.respond = fail_once
    assert judge.judge(PAIRS[:1]) == [Verdict.REFUSED]
    assert len(endpoint.requests) == 3


def test_a_server_that_goes_on_failing_leaves_answers_invalid(endpoint: Endpoint) -> None:
    judge = connect(endpoint)

    def fail_on_refusals(number: int, content: str):
        return say("", 500) if "can't" in content else grade(number, content)

    endpoint.respond = fail_on_refusals
    assert judge.judge(PAIRS[:2]) == [Verdict.INVALID, Verdict.COMPLIED]
    assert len(endpoint.requests) == 1 + 1 + 4  # three waits, four tries


@pytest.mark.parametrize(
    "body", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"\xff"]
)
def test_nonsense_in_place_of_json_is_invalid(endpoint: Endpoint, body: bytes) -> None:
    judge = connect(endpoint)

    def answer(number: int, content: str):
        return (200, {}, body) if "can't" in content else grade(number, content)

    endpoint.respond = answer
    assert judge.judge(PAIRS[:2]) == [Verdict.INVALID, Verdict.COMPLIED]


def test_a_server_that_does_not_answer_in_time_leaves_answers_invalid(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, gate = connect(endpoint), threading.Event()
    monkeypatch.setattr(remote_judge, "TIMEOUT_SECONDS", 0.2)

    def wait(number: int, content: str):
        if "can't" in content:
            gate.wait(5)
        return grade(number, content)

    endpoint.respond = wait
    try:
        assert judge.judge(PAIRS[:2]) == [Verdict.INVALID, Verdict.COMPLIED]
    finally:
        gate.set()


def test_a_judge_that_grades_nothing_at_all_is_refused(endpoint: Endpoint) -> None:
    judge = connect(endpoint)
    endpoint.respond = lambda number, content: say("", 403)
    with pytest.raises(EvaluationError, match="at least one grade, found none on 3 answers: the"):
        judge.judge(PAIRS)


@pytest.mark.parametrize("status", [401, 404])
def test_a_key_or_a_model_that_is_not_known_is_refused_before_anything_computes(
    endpoint: Endpoint, status: int
) -> None:
    endpoint.respond = lambda number, content: say("", status)
    with pytest.raises(
        EvaluationError, match=f"found the answer {status} .*OPENAI_API_KEY"
    ) as info:
        connect(endpoint)
    assert len(endpoint.requests) == 1
    assert KEY not in str(info.value)


def test_nobody_there_is_refused_at_once(endpoint: Endpoint) -> None:
    endpoint.server.server_close()
    with pytest.raises(EvaluationError, match="Connection refused"):
        connect(endpoint)


def test_a_model_that_takes_no_temperature_is_asked_without(endpoint: Endpoint) -> None:
    def refuse_temperature(number: int, content: str):
        has_temperature = "temperature" in endpoint.requests[number - 1][1]
        return say("", 400) if has_temperature else grade(number, content)

    endpoint.respond = refuse_temperature
    assert connect(endpoint).judge(PAIRS[:1]) == [Verdict.REFUSED]
    assert ["temperature" in body for _, body in endpoint.requests] == [True, False, False]


def test_the_key_goes_nowhere_else(endpoint: Endpoint) -> None:
    endpoint.respond = lambda number, content: (302, {"Location": f"{endpoint.url}/other"}, b"")
    with pytest.raises(EvaluationError, match="found the answer 302"):
        connect(endpoint)
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("openai:gpt", "expected MODEL@URL"),
        ("openai:@https://x.org", "expected MODEL@URL"),
        ("openai:gpt@https://", "expected MODEL@URL"),
        ("openai:gpt@https://me:pass@x.org/v1", "a URL without a user or a query"),
        ("openai:gpt@https://x.org/v1?key=pass", "a URL without a user or a query"),
        ("openai:gpt@https://x.org/v1", "a key in the environment variable OPENAI_API_KEY"),
    ],
)
def test_what_can_not_be_asked_is_refused(
    judge: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EvaluationError, match=message) as info:
        check_judges(make_judges([judge], PLACE))
    assert "pass" not in str(info.value)
