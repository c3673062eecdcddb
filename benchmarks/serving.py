"""Many clients at once: `python -m benchmarks.serving MODEL [--clients 16] [--tokens 64] [--threads N] [--peer …]`.

Starts `rkf serve MODEL`, or with --peer the server of that Python's llama_cpp on a GGUF file, and streams answers of
a fixed length: first to one client, then to all at once. Each client's prompt is its own after a common beginning.
The last line is JSON: tokens per second of one client and of all together, seconds to the first token (median and
longest), and from start to the first answer.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from time import perf_counter, sleep
from typing import NamedTuple

SYSTEM = "You answer questions about cities, rivers and mountains of the world, in a few plain sentences. " * 4


class Streamed(NamedTuple):
    """One streamed answer. whole_s: from the request to the end; parts: of the body, with the time since the request.

    Events are read out of the parts after all answers have come, so that clients take little of the server's time.
    """

    whole_s: float
    parts: list[tuple[float, bytes]]

    def timed(self) -> Timed:
        first, counted, pieces, line = 0.0, 0, 0, b""
        for arrived, part in self.parts:
            *lines, line = (line + part).split(b"\n")
            for event in (json.loads(each[6:]) for each in lines if each.startswith(b"data: {")):
                counted = (event.get("usage") or {}).get("completion_tokens", counted)
                if event["choices"] and event["choices"][0]["delta"].get("content"):
                    first, pieces = first or arrived, pieces + 1
        return Timed(first, self.whole_s, counted or pieces)


class Timed(NamedTuple):
    """One answer. first_s: from the request to the first text; whole_s: to the end; tokens: as the server counts them,
    or one for each piece of text if it does not.
    """

    first_s: float
    whole_s: float
    tokens: int


def ask(port: int, model: str, number: int, tokens: int) -> Streamed:
    """Stream one answer of at most `tokens` tokens."""
    body = {
        "model": model,
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"Tell a long story of city {number}."},
        ],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(response.read().decode())
    parts = []
    while part := response.read1():
        parts.append((perf_counter() - began, part))
    connection.close()
    return Streamed(perf_counter() - began, parts)


def measured(port: int, model: str, clients: int, tokens: int) -> dict[str, float]:
    """Rates of one client, then of all at once."""
    ask(port, model, -1, 4)  # the common beginning
    alone = [ask(port, model, number, tokens).timed() for number in (-2, -3)]
    began = perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        streams = list(pool.map(lambda number: ask(port, model, number, tokens), range(clients)))
    elapsed = perf_counter() - began
    crowd = [stream.timed() for stream in streams]
    return {
        "one_tok_s": max(each.tokens / each.whole_s for each in alone),
        "one_first_s": min(each.first_s for each in alone),
        "all_tok_s": sum(each.tokens for each in crowd) / elapsed,
        "all_first_s": median(each.first_s for each in crowd),
        "all_first_longest_s": max(each.first_s for each in crowd),
        "fewest_tokens": min(each.tokens for each in (*alone, *crowd)),
    }


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Return when the server listens."""
    while process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            sleep(0.02)
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer")
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    name, threads = "m", str(options.threads)
    if options.peer:
        command = [options.peer, "-m", "llama_cpp.server", "--model", options.model, "--n_threads", threads]
        command += ["--n_threads_batch", threads, "--n_ctx", "4096", "--verbose", "false"]
        command += ["--interrupt_requests", "false"]
    else:
        name = options.model.rpartition("/")[2].removesuffix(".rkf")
        command = [sys.executable, "-m", "rkf", "serve", options.model, "--threads", threads]
    began = perf_counter()
    with subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(port, process)
            ask(port, name, -9, 1)
            started = perf_counter() - began
            print(json.dumps({"start_s": started, **measured(port, name, options.clients, options.tokens)}))
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
