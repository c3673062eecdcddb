"""Load on `rkf serve`: mixed requests, schemas, malformed requests and bad clients; then what is left behind.

`python -m tests.serve.load [PART…] [--requests 1000] [--malformed 10000]` runs the long form on a tiny random model and
prints a line of JSON for each part; test_load.py runs a short one.
"""

import argparse
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import jsonschema

from tests.runtime import tiny
from tests.serve.conftest import TOOLS
from tests.serve.running import call, events, typed_events
from tests.serve.schemas import SCHEMAS

CHAT, TEXT, RESPONSES, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Left(NamedTuple):
    """What a server holds while it is idle."""

    resident_mib: float
    handles: int
    cache_bytes: int


class Server:
    """A running `rkf serve` of one tiny model."""

    def __init__(self, port, process):
        self.port, self.process = port, process

    def left(self, handles=0):
        """What it holds once nothing runs and each kept beginning is one page. handles: wait some seconds until no more
        of them are open.
        """
        with ThreadPoolExecutor(8) as pool:  # 64 beginnings are kept
            list(pool.map(lambda n: call(self.port, TEXT, text_body([3 + n % 390, n // 390], 1)), range(80)))
        self.wait_until_idle()
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        open_handles = self._open_handles(handles)
        cache = re.search(r"^rkf_cache_bytes (\S+)", call(self.port, "/metrics")[1], re.MULTILINE)[1]
        return Left(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, open_handles, int(float(cache)))

    def _open_handles(self, enough):
        """The least of many counts: the server closes a connection a moment after its client has the answer. No new
        connection comes in between.
        """
        folder, counts = Path(f"/proc/{self.process.pid}/fd"), []
        while len(counts) < 10 or (min(counts) > enough > 0 and len(counts) < 300):
            counts.append(len(list(folder.iterdir())))
            time.sleep(0.05)
        return min(counts)

    def wait_until_idle(self):
        for _ in range(600):
            text = call(self.port, "/metrics")[1]
            if "rkf_running_requests 0.0" in text and "rkf_waiting_requests 0.0" in text:
                return
            time.sleep(0.05)
        raise AssertionError("it never becomes idle")


@contextmanager
def served(folder):
    """A Server over a tiny model with a template for tools."""
    config = tiny.config(context_length=1024)
    path = tiny.write(Path(folder) / "m.rkf", config, tiny.weights(config, seed=1), template=TOOLS)
    command = [sys.executable, "-m", "rkf", "serve", str(path), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        port = next(int(line.split(":")[-1].split()[0]) for line in process.stderr if "serving m at" in line)
        Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
        try:
            yield Server(port, process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    assert process.returncode == 0


def text_body(prompt, tokens, **more):
    return {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, **more}


def chat_body(text, tokens, **more):
    return {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": tokens, **more}


# --- mixed requests


def mixed(server, count, clients=24):
    """Requests of every kind, many at once. Each must be answered; returns the longest times by kind, in seconds."""
    longest = Counter()

    def ask(number):
        draw = random.Random(number)
        kind = draw.choice(list(_KINDS))
        began = time.monotonic()
        _KINDS[kind](server.port, draw)
        longest[kind] = max(longest[kind], time.monotonic() - began)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(count)))
    return {kind: round(seconds, 2) for kind, seconds in sorted(longest.items())}


def _ok(answer):
    status, found = answer
    assert status == 200, found
    return found


def _chat(port, draw):
    found = _ok(call(port, CHAT, chat_body("The capital? " * draw.randint(1, 40), draw.randint(1, 60), seed=1)))
    assert found["choices"][0]["finish_reason"] in ("stop", "length")


def _stream(port, draw):
    found = events(port, CHAT, chat_body("def add", draw.randint(1, 200), temperature=1.0, seed=draw.randint(0, 9)))
    assert found[-1]["choices"][0]["finish_reason"]


def _choices(port, draw):
    assert len(_ok(call(port, CHAT, chat_body("One of many", 20, n=3, temperature=1.5)))["choices"]) == 3


def _scores(port, draw):
    _ok(call(port, TEXT, text_body("The capital of France is" * draw.randint(1, 20), 1, echo=True, logprobs=3)))


def _embeddings(port, draw):
    texts = ["The capital " * draw.randint(1, 30) for _ in range(draw.randint(1, 20))]
    assert len(_ok(call(port, EMBEDDINGS, {"model": "m", "input": texts}))["data"]) == len(texts)


def _response(port, draw):
    found = typed_events(port, RESPONSES, {"model": "m", "input": "Hello", "max_output_tokens": draw.randint(1, 50)})
    assert found[-1]["type"] in ("response.completed", "response.incomplete")


def _tool(port, draw):
    body = chat_body("Weather", 200, tools=[TOOL], tool_choice="required", seed=draw.randint(0, 9))
    assert _ok(call(port, CHAT, body))["choices"][0]["finish_reason"] == "tool_calls"


def _long_prompt(port, draw):
    _ok(call(port, TEXT, text_body([draw.randint(3, 399) for _ in range(draw.randint(400, 1000))], 4)))


def _vanish(port, draw):
    with open_request(port, CHAT, chat_body("Going", 900, stream=True, logit_bias={"2": -100})) as gone:
        gone.recv(draw.randint(1, 4000))


def _tokens(port, draw):
    ids = _ok(call(port, "/tokenize", {"content": "The capital"}))["tokens"]
    assert _ok(call(port, "/detokenize", {"tokens": ids}))["content"] == "The capital"


_KINDS = {
    "chat": _chat,
    "stream": _stream,
    "choices": _choices,
    "scores": _scores,
    "embeddings": _embeddings,
    "response": _response,
    "tool": _tool,
    "long prompt": _long_prompt,
    "vanish": _vanish,
    "tokens": _tokens,
}


# --- schemas


def against_schemas(server, count, clients=8):
    """Answers to the schemas in turn. Each must be valid, or cut and said so; returns how many were which."""

    def ask(number):
        schema = SCHEMAS[number % len(SCHEMAS)]
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        body = chat_body("Fill it in.", 250, temperature=1.0, seed=number, response_format=form)
        choice = _ok(call(server.port, CHAT, body))["choices"][0]
        if choice["finish_reason"] == "length":
            return "length"
        assert choice["finish_reason"] == "stop", choice
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
        validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
        validator.validate(json.loads(choice["message"]["content"]))
        return "valid"

    with ThreadPoolExecutor(clients) as pool:
        return dict(Counter(pool.map(ask, range(count))))


# --- malformed requests and bad clients


def mutated(data, draw):
    """The bytes of a request with a few of them changed, left out or put in."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        kind, at = draw.random(), draw.randrange(len(data) or 1)
        if kind < 0.4 and data:
            data[at] = draw.randrange(256)
        elif kind < 0.7:
            del data[at : at + draw.randint(1, 9)]
        else:
            data[at:at] = draw.choice([b"[", b"{", b'"', b"null", b"1e999", b"-", b"\\ud800", b"\x00"])
    return bytes(data) or b"{"


def malformed(server, count):
    """Requests with faults in their bodies. None may fail inside; returns how many had which status."""
    draw, found = random.Random(1), Counter()
    chat = chat_body("The capital?", 2, n=1, logprobs=None, response_format={"type": "text"})
    good = {
        CHAT: chat,
        TEXT: text_body("The", 2),
        RESPONSES: {
            "model": "m",
            "input": "The capital?",
            "max_output_tokens": 2,
            "text": {"format": {"type": "text"}},
        },
        EMBEDDINGS: {"model": "m", "input": ["The", "capital"], "encoding_format": "float", "dimensions": 8},
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    for number in range(count):
        path = list(good)[number % len(good)]
        data = mutated(json.dumps(good[path]).encode(), draw)
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status < 500, (data, answer)
        assert ("message" in (answer.get("error") or {})) == (response.status != 200), (data, answer)
        found[response.status] += 1
    connection.close()
    return dict(found)


def open_request(port, path, body, *, cut=0):
    """A connection with a request on it. cut: bytes of the body that are not sent."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + data[: len(data) - cut])
    return connection


def bad_clients(server, count):
    """Clients that send slowly, close one half, vanish, or never read, while others are answered all the time.

    Returns the longest time of the others, in seconds.
    """
    endless = chat_body("Endless", 900, stream=True, n=4, logprobs=True, top_logprobs=20, logit_bias={"2": -100})
    held, longest = [], 0.0
    for number in range(count):
        kind = number % 4
        connection = open_request(server.port, CHAT, endless, cut=20 if kind == 0 else 0)
        if kind == 1:
            connection.shutdown(socket.SHUT_WR)
        if kind == 2:
            connection.close()
        held.append(connection)
        began = time.monotonic()
        _ok(call(server.port, CHAT, chat_body("Another", 3)))
        longest = max(longest, time.monotonic() - began)
    for connection in held:
        connection.close()
    server.wait_until_idle()
    return round(longest, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="mixed, schemas, malformed, clients; default: all")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--malformed", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(folder) as server:
        mixed(server, 200)  # after which everything that is allocated once is there
        parts = {
            "mixed": lambda: mixed(server, options.requests),
            "schemas": lambda: against_schemas(server, options.requests),
            "malformed": lambda: malformed(server, options.malformed),
            "clients": lambda: bad_clients(server, options.requests // 10),
        }
        for name in options.parts or parts:
            before, began = server.left(), time.monotonic()
            found = parts[name]()
            after = server.left()
            seconds = round(time.monotonic() - began)
            line = {"part": name, "found": found, "before": before, "after": after, "seconds": seconds}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
