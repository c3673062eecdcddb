"""`rkf run` and `rkf chat` as a user types them, on a tiny model."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

import rkf
from rkf import __version__
from rkf.cache import cache_dir
from rkf.commands.default_model import NAME
from tests.runtime import tiny

CONFIG = tiny.config(context_length=2048, eos_ids=())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny.write(tmp_path_factory.mktemp("model") / "tiny.rkf", CONFIG, tiny.weights(CONFIG))
    with rkf.load(path) as ready:  # compiles missing kernels here, so the message is not in a test's stderr
        ready.generate("The", max_tokens=2)
    return path


def cut(tokens):
    """What stderr says of an answer without an end."""
    return f"(cut at {tokens} tokens; --max-tokens allows more)\n"


def command(*arguments):
    return [sys.executable, "-m", "rkf", *map(str, arguments)]


def run(*arguments, **options):
    return subprocess.run(command(*arguments), capture_output=True, encoding="utf-8", check=False, **options)


def test_run_prints_the_answer_and_nothing_else(model):
    done = run("run", model, "--prompt", "The capital?", "--system", "Be brief.", "--max-tokens", "9")
    with rkf.load(model) as ready:
        answer = ready.generate("The capital?", system="Be brief.", max_tokens=9)
    assert (done.returncode, done.stderr) == (0, cut(9))
    assert done.stdout == answer + "\n"


def test_a_prompt_comes_from_a_file_or_a_pipe_too(model, tmp_path):
    prompt = "The capital?\r\nOf France?"
    wanted = run("run", model, "--prompt", prompt, "--max-tokens", "6").stdout
    path = tmp_path / "prompt.txt"
    path.write_bytes(prompt.encode() + b"\n")
    assert run("run", model, "--prompt-file", path, "--max-tokens", "6").stdout == wanted
    for arguments in ([], ["--prompt", "-"]):
        done = subprocess.run(
            command("run", model, "--max-tokens", "6", *arguments),
            input=path.read_bytes(),
            capture_output=True,
            check=False,
        )
        assert done.stdout.decode() == wanted


def test_run_passes_its_options_on(model):
    options = [
        "--prompt",
        "The",
        "--raw",
        "--max-tokens",
        "12",
        "--temperature",
        "1.5",
        "--seed",
        "3",
        "--threads",
        "1",
    ]
    done = run("run", model, *options)
    with rkf.load(model, threads=1) as ready:
        assert done.stdout == ready.generate("The", raw=True, max_tokens=12, temperature=1.5, seed=3) + "\n"


def test_an_answer_has_the_form_that_is_asked_for(tmp_path):
    model = tiny.write(tmp_path / "ends.rkf", tiny.config(context_length=512), tiny.weights(CONFIG))
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [12, 34]}')
    done = run("run", model, "--prompt", "The", "--json-schema", schema)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout in ("12\n", "34\n")
    schema.write_text('{"type": "nothing"}')
    done = run("chat", model, "--json-schema", schema, input="The\n")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("rkf: json_schema: Invalid type")
    done = run("run", model, "--prompt", "The", "--json-schema", schema, "--grammar", schema)
    assert (done.returncode, "exclude each other" in done.stderr) == (2, True)


def test_a_template_gets_its_arguments(tmp_path):
    template = "{{ messages[0].content }}{% if quick %} France{% endif %} {{ style }}"
    path = tiny.write(tmp_path / "t.rkf", CONFIG, tiny.weights(CONFIG), template=template)
    done = run(
        "run",
        path,
        "--prompt",
        "The",
        "--max-tokens",
        "5",
        "--template-arg",
        "quick=true",
        "--template-arg",
        "style=a=b",
    )
    with rkf.load(path) as ready:
        assert done.stdout == ready.generate("The France a=b", raw=True, max_tokens=5) + "\n"
    assert "expected KEY=VALUE" in run("run", path, "--prompt", "The", "--template-arg", "quick").stderr


def test_recommended_sampling_is_said_and_given_options_replace_it(tmp_path):
    path = tiny.write(
        tmp_path / "t.rkf", tiny.config(eos_ids=(), generation={"temperature": 1.5}), tiny.weights(CONFIG)
    )
    done = run("run", path, "--prompt", "The", "--max-tokens", "9", "--seed", "4")
    assert "(the model's recommended sampling: temperature 1.5; --temperature 0 " in done.stderr
    with rkf.load(path) as ready:
        assert done.stdout == ready.generate("The", max_tokens=9, temperature=1.5, seed=4) + "\n"
        assert run("run", path, "--prompt", "The", "--max-tokens", "9", "--temperature", "0").stderr == cut(9)


def test_stats_go_to_stderr(model):
    plain = run("run", model, "--prompt", "The", "--max-tokens", "5")
    done = run("run", model, "--prompt", "The", "--max-tokens", "5", "--stats")
    assert done.stdout == plain.stdout
    number = r"\d+\.\d+"
    assert re.fullmatch(
        rf"{re.escape(cut(5))}load {number} s, prompt \d+ tokens {number} s \({number} tok/s\), "
        rf"answer 5 tokens {number} s \({number} tok/s\), first token after {number} s\n",
        done.stderr,
    )


def test_without_a_model_the_default_one_is_taken_from_the_cache(model, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"{NAME}-{__version__}.rkf").symlink_to(model)
    (tmp_path / "kernels").symlink_to(cache_dir() / "kernels")
    done = run("run", "--prompt", "The", "--max-tokens", "5", env=os.environ | {"RKF_CACHE": str(tmp_path)})
    assert (done.returncode, done.stdout) == (0, run("run", model, "--prompt", "The", "--max-tokens", "5").stdout)


def test_chat_remembers_the_turns_before(model):
    done = run("chat", model, "--system", "Be brief.", "--max-tokens", "6", input="The capital?\n\nAnd the river?\n")
    messages = [{"role": "system", "content": "Be brief."}]
    answers = []
    with rkf.load(model) as ready:
        for question in ("The capital?", "And the river?"):
            messages.append({"role": "user", "content": question})
            answers.append(ready.chat(messages, max_tokens=6))
            messages.append({"role": "assistant", "content": answers[-1]})
    assert (done.returncode, done.stderr) == (0, cut(6) * 2)
    assert done.stdout == "".join(answer + "\n" for answer in answers)


def test_chat_forgets_the_oldest_turn_when_the_context_is_full(tmp_path):
    config = tiny.config(context_length=160, eos_ids=())
    path = tiny.write(tmp_path / "short.rkf", config, tiny.weights(config))
    done = run("chat", path, "--max-tokens", "4", input="The capital of France is Paris and so on\n" * 6)
    assert done.returncode == 0
    assert "oldest turn no longer fits" in done.stderr


def test_chat_goes_on_after_a_line_that_is_too_long_or_no_text(tmp_path):
    config = tiny.config(context_length=160, eos_ids=())
    path = tiny.write(tmp_path / "short.rkf", config, tiny.weights(config))
    short = run("chat", path, "--max-tokens", "4", input="The\nAnd?\n")
    lines = b"The\n" + b"capital " * 300 + b"\n\xff\nAnd?\n"
    done = subprocess.run(command("chat", path, "--max-tokens", "4"), input=lines, capture_output=True, check=False)
    assert (done.returncode, done.stdout.decode()) == (0, short.stdout)
    for said in ("the model's context 160", "the line was ignored", "the line is not UTF-8"):
        assert said in done.stderr.decode()


class Terminal:
    """`rkf` on a pseudo-terminal, with Ctrl-C and Ctrl-D sent as by a keyboard."""

    def __init__(self, *arguments):
        self.screen = ""
        self._terminal, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command(*arguments),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # The test runner may itself ignore Ctrl-C (as a background job does), and children inherit that.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)

    def type(self, text):
        os.write(self._terminal, text.encode())

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def wait_for(self, pattern):
        """The output up to a pattern, since the last call."""
        while not (found := re.search(pattern, self.screen)):
            piece = self._read()
            assert piece, f"ended without {pattern!r}: {self.screen!r}"
            self.screen += piece
        text, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return text

    def finish(self):
        """The exit code, after the process has ended by itself."""
        while piece := self._read():
            self.screen += piece
        return self.process.wait(timeout=30)

    def _read(self):
        ready, _, _ = select.select([self._terminal], [], [], 30)
        assert ready, f"silent for 30 s after {self.screen!r}"
        try:
            return os.read(self._terminal, 1 << 16).decode(errors="replace")
        except OSError:  # Linux reports a closed other end like this
            return ""


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(model):
    terminal = Terminal("chat", model, "--max-tokens", "2000")
    terminal.wait_for("> ")
    terminal.type("The capital?\n")
    terminal.wait_for(r"The capital\?\r\n..")
    terminal.interrupt()
    terminal.wait_for(r"\(stopped\)")
    terminal.wait_for("> ")
    terminal.type("half a line")
    terminal.wait_for("half a line")
    time.sleep(0.2)  # a signal between two reads of the line editor would wait for the next key
    terminal.interrupt()
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.finish() == 0
    assert "Traceback" not in terminal.screen


def test_ctrl_c_ends_run_with_130(model):
    terminal = Terminal("run", model, "--prompt", "The", "--raw", "--max-tokens", "2000")
    terminal.wait_for(r"\w")
    terminal.interrupt()
    assert terminal.finish() == 130
    assert "Traceback" not in terminal.screen
