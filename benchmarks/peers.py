"""llama.cpp and its forks as opponents in a comparison of speed: through a Python with llama-cpp-python, or through any
`llama-bench` binary, whose options may follow it (`--peer "build/bin/llama-bench -rtr 1"`).
"""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Protocol

SERVED = Path(__file__).with_name("peer_speed.py")


class Peer(Protocol):
    """A model of a peer. A case is `prefill N` or `decode N AFTER` (peer_speed.py)."""

    def seconds(self, case: str) -> float:
        """Run one case."""

    def close(self) -> None:
        """End its process."""


def peer(command: str, model: str, threads: int, context: int) -> Peer:
    """The peer that a command line names. context: room for the longest case."""
    words = shlex.split(command)
    if Path(words[0]).name.startswith("llama-bench"):
        return LlamaBench(words, model, threads)
    return LlamaPython(words, model, threads, context)


class LlamaPython:
    """llama-cpp-python in a separate process, with one model loaded."""

    def __init__(self, python: list[str], model: str, threads: int, context: int) -> None:
        command = [*python, str(SERVED), model, str(threads), str(context)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line()

    def seconds(self, case: str) -> float:
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args}: ended before it answered")
        return line


class LlamaBench:
    """A `llama-bench` binary. It loads the model and warms up in every call, and reports the time of the case alone."""

    def __init__(self, command: list[str], model: str, threads: int) -> None:
        self._command = [*command, "-m", model, "-t", str(threads), "-r", "1", "-o", "json"]
        usage = subprocess.run([command[0], "--help"], capture_output=True, text=True, check=False)
        self._forked = "-gp" in usage.stdout + usage.stderr  # ik_llama.cpp's option where llama.cpp has -d

    def seconds(self, case: str) -> float:
        command = [*self._command, *self._options(*case.split())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}: {done.stderr.strip()[-500:]}")
        return float(json.loads(done.stdout)[-1]["avg_ns"]) / 1e9

    def close(self) -> None:
        """Nothing is left running."""

    def _options(self, what: str, count: str, after: str = "0") -> list[str]:
        if what == "prefill":
            return ["-p", count, "-n", "0"]
        if after == "0":
            return ["-p", "0", "-n", count]
        if self._forked:
            return ["-p", "0", "-n", "0", "-gp", f"{after},{count}"]
        return ["-p", "0", "-n", count, "-d", after]
