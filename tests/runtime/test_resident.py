"""The memory of a model: the file's pages, which processes share, and little else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime import tiny

ROOT = Path(__file__).parents[2]
MOST_BESIDE = 150e6
PROGRAM = """
import json, sys
import rkf
from rkf.runtime.resident import resident
with rkf.load(sys.argv[1]) as model:
    model.generate("The", raw=True, max_tokens=8)
    print(flush=True)
    for line in sys.stdin:
        print(json.dumps(resident(sys.argv[1])), flush=True)
"""


class Process:
    def __init__(self, path):
        command = [sys.executable, "-c", PROGRAM, str(path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout.readline() == "\n"

    def resident(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.communicate()
        assert self.process.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages a process shares")
def test_two_processes_share_the_file_and_hold_little_besides(tmp_path):
    config = tiny.config()
    path = tiny.write(tmp_path / "tiny.rkf", config, tiny.weights(config))
    Process(path).close()  # compiles missing kernels
    one = Process(path)
    alone = one.resident()
    two = Process(path)
    shared = one.resident()
    two.close()
    one.close()
    whole = -(-path.stat().st_size // os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PAGE_SIZE")
    assert 0.9 * whole < alone["mapped_bytes"] == alone["mapped_pss_bytes"] <= whole
    assert shared["mapped_pss_bytes"] < 0.6 * shared["mapped_bytes"]
    assert alone["rss_bytes"] - alone["mapped_bytes"] < MOST_BESIDE
