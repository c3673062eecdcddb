"""What the server refuses, and that it goes on for the others: one clear message each, with the right status."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from rkf.serve import app, driver, replies
from rkf.serve.catalogue import EngineOptions
from tests.serve.running import call, events, running

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "The capital?"}], "max_tokens": 3}


def refusal(port, body, path=CHAT, **headers):
    status, found = call(port, path, body, **headers)
    assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}, found
    assert "\n" not in found["error"]["message"]
    return status, found["error"]["message"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": None}, "messages: "),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no images, audio or files"),
        ({"messages": [{"role": "user", "content": "capital " * 3000}]}, "tokens, the model's context 1024"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, ""),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]}, "messages.0.tool_calls.0.function: "),
        ({"temperature": -1}, "temperature: "),
        ({"temperature": "hot"}, "temperature: "),
        ({"top_p": 2}, "top_p: "),
        ({"n": 1000}, "n: "),
        ({"max_tokens": -1}, "max_tokens: "),
        ({"stop": ["x"] * 17}, "at most 16"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias: expected token ids"),
        ({"logit_bias": {"400": 1}}, "logit_bias: expected token ids in 0 .. 399"),
        ({"top_logprobs": 3}, "needs logprobs: true"),
        ({"response_format": {"type": "poem"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "Invalid type"),
        ({"response_format": {"type": "regex", "regex": "("}}, "unclosed group"),
        ({"tools": [{"type": "function", "function": {"name": "no name"}}]}, "tools.0.function.name: "),
    ],
    ids=range(22),
)
def test_a_request_that_is_wrong_is_named(port, change, message):
    status, told = refusal(port, BODY | change)
    assert status == 400 and message in told
    assert call(port, CHAT, BODY)[0] == 200


EXPLODING = [
    {"type": "regex", "regex": "((a{1,999}){1,999}){1,999}b"},
    {"type": "regex", "regex": "(a|aa|aaa)*(b|bb)*" * 2000},
    {
        "type": "grammar",
        "grammar": "start: x\n"
        + "\n".join(f"{a}: {b} {b} {b}" for a, b in zip("xyzuvw", "yzuvwt", strict=True))
        + "\nt: /a*/",
    },
    {"type": "json_schema", "json_schema": {"schema": {"enum": [str(n) * 9 for n in range(9999)]}}},
]


@pytest.mark.parametrize("form", EXPLODING, ids=range(4))
def test_a_form_that_explodes_stops_nobody(port, form):
    began = time.monotonic()
    status, _ = call(port, CHAT, BODY | {"response_format": form, "max_tokens": 20})
    assert status in (200, 400) and time.monotonic() - began < 20
    assert call(port, CHAT, BODY)[0] == 200


def test_other_statuses(port, monkeypatch):
    assert refusal(port, b"{")[0] == 400
    assert refusal(port, b'{"model": "tiny", "temperature": NaN, "messages": []}')[0] == 400
    assert refusal(port, b"[" * 100_000)[0] == 400
    assert refusal(port, BODY | {"model": "other"})[0] == 404
    assert refusal(port, BODY, path="/v1/nothing")[0] == 404
    assert refusal(port, None, path=CHAT)[0] == 405
    assert refusal(port, BODY, **{"Content-Type": "text/plain"})[0] == 415
    assert refusal(port, b" " * (9 << 20))[0] == 413
    assert refusal(port, BODY, Host="evil.example:80")[0] == 403
    assert refusal(port, BODY, Host="[::1")[0] == refusal(port, BODY, Host="")[0] == 403
    assert refusal(port, BODY, Origin="http://evil.example")[0] == refusal(port, BODY, Origin="http://[")[0] == 403
    assert call(port, CHAT, BODY, Origin=f"http://127.0.0.1:{port}")[0] == 200


def test_keys(paths):
    with running({"tiny": paths["tiny"]}, keys=["one", "two"], origins=["http://page.example"]) as port:
        assert refusal(port, BODY)[0] == refusal(port, BODY, Authorization="Bearer three")[0] == 401
        for key in ("one", "two"):
            assert call(port, CHAT, BODY, Authorization=f"Bearer {key}")[0] == 200
        assert refusal(port, None, path="/metrics")[0] == 401
        assert call(port, "/health")[0] == call(port, "/")[0] == 200
        assert call(port, "/health", Origin="http://page.example")[0] == 200


def test_a_full_queue_says_so(paths):
    with running({"tiny": paths["tiny"]}, EngineOptions(parallel=1, queue=1)) as port:
        assert refusal(port, BODY | {"n": 3})[0] == 429
        assert call(port, CHAT, BODY | {"n": 2})[0] == 200


def test_a_slow_body_is_given_up(port, monkeypatch):
    monkeypatch.setattr(replies, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
        assert b"408" in slow.recv(4096)
    assert call(port, CHAT, BODY)[0] == 200


LONG = BODY | {"max_tokens": 900, "logit_bias": {"2": -100}}


def idle(port):
    """Whether nothing runs, within a while."""
    for _ in range(200):
        if "rkf_running_requests 0.0" in call(port, "/metrics")[1]:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_answer(port, stream):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as gone:
        body = json.dumps(LONG | {"stream": stream, "n": 8}).encode()
        gone.sendall(b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n" % CHAT.encode())
        gone.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        time.sleep(0.1)
    before = call(port, "/metrics")[1]
    assert idle(port)
    assert "rkf_answers_total" in before
    assert call(port, CHAT, BODY)[0] == 200


def test_a_client_that_never_reads_is_dropped_and_others_go_on(paths, monkeypatch):
    monkeypatch.setattr(driver, "MOST_UNREAD", 4)
    monkeypatch.setattr(driver, "PATIENCE_S", 0.5)
    monkeypatch.setattr(app, "UNREAD_SECONDS", 2)
    with running({"tiny": paths["tiny"]}, EngineOptions(parallel=2)) as port, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.connect(("127.0.0.1", port))
        body = json.dumps(LONG | {"stream": True, "logprobs": True, "top_logprobs": 20}).encode()
        deaf.sendall(b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n" % CHAT.encode())
        deaf.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        for _ in range(10):
            assert call(port, CHAT, BODY)[0] == 200
        assert idle(port)
        time.sleep(3)
        with pytest.raises(OSError):  # closed
            while True:
                deaf.sendall(b"x")
                time.sleep(0.1)


def test_bytes_that_are_no_http_harm_nobody(port):
    for junk in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20000, b"\x00" * 9999):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as odd:
            try:
                odd.sendall(junk)
                odd.shutdown(socket.SHUT_WR)
                odd.recv(4096)
            except OSError:
                continue
    assert call(port, "/health")[0] == 200


def test_sigterm_lets_running_answers_finish(paths):
    command = [sys.executable, "-m", "rkf", "serve", str(paths["tiny"]), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        port = next(int(line.split(":")[-1].split()[0]) for line in process.stderr if "serving tiny at" in line)
        found = []
        work = threading.Thread(target=lambda: found.extend(events(port, CHAT, LONG)))
        work.start()
        while "rkf_running_requests 1.0" not in call(port, "/metrics")[1]:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        work.join(30)
        assert found[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0
        process.stderr.read()
    with pytest.raises(OSError):
        call(port, "/health")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tiny}", "{tiny}"], "is taken by"),
        (["{tiny}", "--grammar", "/dev/null"], "grammar: "),
        (["/nothing.rkf"], "nothing.rkf"),
        (["{tiny}", "--api-key-file", "/dev/null"], "expected a file"),
    ],
    ids=range(4),
)
def test_a_wrong_start_is_one_line(paths, arguments, message):
    command = [sys.executable, "-m", "rkf", "serve", *(a.replace("{tiny}", str(paths["tiny"])) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode and len(done.stderr.splitlines()) < 6
