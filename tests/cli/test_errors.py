"""Exit codes and messages: one line on stderr, nothing on stdout, never a traceback."""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import click
import pytest
from click.testing import CliRunner

from rkf.cli import Verbs
from rkf.errors import CorruptError, NotRkfError, OutputError, UnsupportedError, UsageError
from tests.runtime import tiny

CONFIG = tiny.config()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model") / "tiny.rkf", CONFIG, tiny.weights(CONFIG))


def rkf(*arguments, **options):
    command = [sys.executable, "-m", "rkf", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def refused(done, code):
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith("rkf: ") and done.stderr.count("\n") == 1, done.stderr


def test_not_an_rkf_file_is_5(tmp_path):
    foreign = tmp_path / "model.gguf"
    foreign.write_bytes(b"GGUF" + bytes(1000))
    refused(rkf("info", foreign), 5)
    refused(rkf("verify", foreign), 5)
    (tmp_path / "empty.rkf").write_bytes(b"")
    refused(rkf("info", tmp_path / "empty.rkf"), 5)


def test_corrupt_is_3_and_only_info_reads_no_more_than_the_directory(model, tmp_path):
    data = bytearray(model.read_bytes())
    data[300] ^= 1  # in the first tensor
    (tmp_path / "flipped.rkf").write_bytes(data)
    refused(rkf("verify", tmp_path / "flipped.rkf"), 3)
    refused(rkf("run", tmp_path / "flipped.rkf", "--prompt", "hi"), 3)
    assert rkf("info", tmp_path / "flipped.rkf").returncode == 0
    (tmp_path / "short.rkf").write_bytes(data[:-1])
    refused(rkf("info", tmp_path / "short.rkf"), 3)


def test_what_needs_torch_says_so(model, tmp_path):
    without = "import sys; sys.modules['torch'] = None; from rkf.cli import main; main()"
    for arguments in (
        ["run", model, "--prompt", "hi", "--device", "cpu-torch"],
        ["tune", model, tmp_path / "out.rkv", "--reference", model],
    ):
        command = [sys.executable, "-c", without, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        refused(done, 2)
        assert "pip install 'rkf-llm[torch]'" in done.stderr


def test_usage_is_2(model, tmp_path):
    refused(rkf("info", tmp_path / "missing.rkf"), 2)
    for arguments in (
        ["info"],
        ["info", model, "--nonsense"],
        ["nonsense"],
        ["bench", model, "--threads", 0],
    ):
        done = rkf(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Usage: rkf" in done.stderr
    refused(rkf("run", model), 2)  # no prompt in the options, and stdin is empty


@pytest.mark.parametrize(
    ("error", "code"),
    [(OutputError, 1), (UsageError, 2), (CorruptError, 3), (UnsupportedError, 4), (NotRkfError, 5)],
)
def test_each_error_has_its_exit_code(error, code):
    done = CliRunner().invoke(failing(error("model.rkf: bad \x1b[31m thing")), ["fail"])
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr == "rkf: model.rkf: bad \\x1b[31m thing\n"


def test_a_system_error_is_one_line_too():
    done = CliRunner().invoke(failing(PermissionError(13, "Permission denied", "out.rkf")), ["fail"])
    assert (done.exit_code, done.stderr) == (1, "rkf: out.rkf: Permission denied\n")


def failing(error):
    """The CLI's own group with a verb that raises."""

    @click.group(cls=Verbs)
    def group():
        pass

    @group.command()
    def fail():
        raise error

    return group


def interrupted(process):
    """Send Ctrl-C until it ends; returns its stderr. The interpreter does not see one that comes just before a read
    that waits.
    """
    for _ in range(30):
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=2)[1]
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    raise AssertionError("Ctrl-C does not end it")


def test_ctrl_c_is_130_without_a_traceback(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # The writer of a pipe waits for its reader, so the process stops exactly here.
    process = subprocess.Popen(
        [sys.executable, "-m", "rkf", "eval", "ppl", "model", "--text", str(pipe)],
        stderr=subprocess.PIPE,
        text=True,
        # The test runner may itself ignore Ctrl-C (as a background job does), and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    with process, open(pipe, "w"):  # noqa: PTH123 - returns once the other side has opened it
        stderr = interrupted(process)
    assert process.returncode == 130
    assert stderr.strip() == ""


def test_a_reader_that_leaves_is_no_error_message(model):
    process = subprocess.Popen(
        f"{sys.executable} -m rkf info {model} --json --tensors | head -c 1",
        shell=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, stderr = process.communicate(timeout=30)
    assert stderr == ""


def test_strings_from_a_file_cannot_steer_the_terminal(tmp_path):
    evil = tiny.config(architecture="llama")
    path = tiny.write(
        tmp_path / "evil.rkf", evil, tiny.weights(evil), provenance={"source": "\x1b]0;owned\x07\u202e\x9b31m"}
    )
    for arguments in ([path], [path, "--json"], [path, "--tensors"]):
        done = rkf("info", *arguments)
        assert done.returncode == 0
        assert "owned" in done.stdout
        assert all(c.isprintable() or c == "\n" for c in done.stdout)


def test_info_as_json_and_as_text(model):
    done = rkf("info", model, "--json", "--tensors")
    described = json.loads(done.stdout)
    assert described["file_bytes"] == model.stat().st_size
    assert described["metadata"]["model"]["vocab_size"] == CONFIG.vocab_size
    assert [tensor["name"] for tensor in described["tensors"]] == sorted([*tiny.weights(CONFIG), "lm_head.weight"])
    assert "tensors" not in json.loads(rkf("info", model, "--json").stdout)
    assert "model.norm.weight" in rkf("info", model, "--tensors").stdout
    assert "model.norm.weight" not in rkf("info", model).stdout


def test_info_imports_nothing_heavy(model):
    code = "import sys; from rkf.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, "info", model], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert {"rkf", "numpy", "click"} <= loaded
    assert not loaded & {
        "numba",
        "llvmlite",
        "torch",
        "transformers",
        "tokenizers",
        "jinja2",
        "gguf",
        "safetensors",
        "tqdm",
    }


def test_version_and_help():
    assert rkf("--version").stdout.startswith("rkf, version ")
    assert rkf("--help").returncode == 0 == rkf("eval", "ppl", "-h").returncode
