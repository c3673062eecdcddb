"""`rkf chat`: turns, a full context, commands, saved conversations, the editor of lines, signals; on a tiny model."""

import json
import signal
import stat
import time
from contextlib import contextmanager

import pytest
from click.testing import CliRunner
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import rkf
from rkf.cli import cli
from rkf.commands import chat_command, line_editor
from rkf.commands.chat_turns import read_conversation
from rkf.errors import UsageError
from rkf.text.terminal import masked
from tests.cli.talking import Terminal, cut, run
from tests.runtime import tiny

CONFIG = tiny.config(context_length=2048, eos_ids=())
SHORT = tiny.config(context_length=160, eos_ids=())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny.write(tmp_path_factory.mktemp("model") / "tiny.rkf", CONFIG, tiny.weights(CONFIG))
    with rkf.load(path) as ready:  # compiles missing kernels here, so the message is not in a test's stderr
        ready.generate("The", max_tokens=2)
    return path


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("short") / "short.rkf", SHORT, tiny.weights(SHORT))


@pytest.fixture(autouse=True)
def own_history(tmp_path, monkeypatch):
    """A cache of its own, for the history, with the kernels of the real one."""
    kernels = rkf.cache.cache_dir() / "kernels"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(kernels)
    monkeypatch.setenv("RKF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "chat" / "history"


@pytest.fixture
def typed(monkeypatch, capsys):
    """A chat at a terminal, in this process: keys -> (exit code, stdout, stderr)."""

    def chat(*arguments, keys):
        monkeypatch.setattr(chat_command, "at_terminal", lambda: True)
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text(keys + "\x04")
            with pytest.raises(SystemExit) as ended:
                cli(["chat", *map(str, arguments), "--max-tokens", "6"])
        return ended.value.code, *capsys.readouterr()

    return chat


def answers(model, *questions, system=None, **options):
    """The conversation of these questions, from the library."""
    messages = [{"role": "system", "content": system}] if system else []
    with rkf.load(model) as ready:
        for question in questions:
            messages.append({"role": "user", "content": question})
            answer = ready.chat(messages, max_tokens=6, **options)
            messages.append({"role": "assistant", "content": answer})
    return messages


def texts(messages):
    return [each["content"] for each in messages if each["role"] == "assistant"]


def test_it_remembers_the_turns_before(model):
    done = run("chat", model, "--system", "Be brief.", "--max-tokens", "6", input="The capital?\n\nAnd the river?\n")
    wanted = texts(answers(model, "The capital?", "And the river?", system="Be brief."))
    assert (done.returncode, done.stderr) == (0, cut(6) * 2)
    assert done.stdout == "".join(answer + "\n" for answer in wanted)


def piped(model, lines):
    return CliRunner().invoke(cli, ["chat", str(model), "--max-tokens", "4"], input=lines)


def test_the_oldest_turns_are_left_out_when_the_context_is_full(short):
    done = piped(short, "The capital of France is Paris and so on\n" * 6)
    assert done.exit_code == 0
    assert "(the oldest 2 messages no longer fit" in done.stderr


def test_a_line_that_is_too_long_or_no_text_changes_nothing(short):
    before = "The capital of France is Paris and so on\n" * 3
    wanted = piped(short, before + "And?\n")
    done = piped(short, before.encode() + b"capital " * 300 + b"\n\xff\nAnd?\n")
    assert (done.exit_code, done.stdout) == (0, wanted.stdout)
    assert "the model's context 160" in done.stderr and "the line was not sent, and nothing is forgotten" in done.stderr
    assert "the line is not UTF-8" in done.stderr
    assert done.stderr.count("no longer fit") == wanted.stderr.count("no longer fit")


def test_lines_of_a_pipe_are_no_commands(model, tmp_path):
    done = piped(model, f"/save {tmp_path / 'c.json'}\n/system x\n")
    assert done.exit_code == 0 and done.stdout.count("\n") >= 2
    assert not (tmp_path / "c.json").exists()


def test_commands(model, typed, tmp_path, own_history):
    path = tmp_path / "c.json"
    code, out, told = typed(
        model,
        keys="The capital?\r"
        "/system Be brief.\r"
        f"/retry\rAnd\x0athe\x1b\rriver?\r/save {path}\r/save {path}\r/foo\r\x03/help\r /foo\r/etc/x\r/save {path}\r",
    )
    turns = answers(model, "The capital?", "And\nthe\nriver?", system="Be brief.")
    assert code == 0
    assert out.startswith(texts(answers(model, "The capital?"))[0] + "\n" + texts(turns)[0] + "\n")
    saved = json.loads(path.read_text())
    assert saved["rkf_conversation"] == 1 and saved["messages"][:5] == turns
    assert [each["content"] for each in saved["messages"][5::2]] == [" /foo", "/etc/x"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "/foo is no command" in told and "/retry        answer" in told and "(saved 8 messages)" in told
    assert "temperature 0 gives the same answer" in told
    assert stat.S_IMODE(own_history.stat().st_mode) == 0o600 and "+The capital?" in own_history.read_text()

    keys = f"/load {path}\r/retry\r/save {path}\r/system\r/load {model}\r\x03"
    keys += f"/save {model}\r\x03/save\r\x03/load none\r\x03"
    code, out, told = typed(model, keys=keys)
    assert code == 0 and out.startswith(saved["messages"][-1]["content"] + "\n")
    assert json.loads(path.read_text()) == saved
    assert "(loaded 8 messages; the last one:)" in told and "system message is removed" in told
    assert "expected the name of a file" in told and "none: cannot be read" in told
    assert "expected UTF-8 text" in told and "exists already: choose another name" in told


def test_a_retry_draws_another_answer_that_can_be_repeated(model, typed, tmp_path):
    path = tmp_path / "c.json"
    options = ["--temperature", "2", "--seed", "7"]
    _, out, told = typed(model, *options, keys=f"The\r/retry\rAnd\r/save {path}\r")
    second = texts(answers(model, "The", temperature=2, seed=8))
    assert (
        texts(json.loads(path.read_text())["messages"])[0]
        == second[0]
        != texts(answers(model, "The", temperature=2, seed=7))[0]
    )
    assert typed(model, *options, keys=f"The\r/retry\rAnd\r/save {tmp_path / 'd.json'}\r")[1] == out
    assert "same answer" not in told


def test_what_was_refused_can_be_edited(short, typed, tmp_path):
    path = tmp_path / "c.json"
    keys = "The\r" + "capital " * 300 + "\r" + "\x08" * 8 * 299 + f"\x08\r/retry\r/save {path}\r"
    _, _, told = typed(short, keys=keys)
    assert "(the prompt has at least" in told and "nothing is forgotten" in told
    saved = json.loads(path.read_text())["messages"]
    assert [each["content"] for each in saved[::2]] == ["The", "capital"]


def test_a_history_that_cannot_be_kept_ends_no_chat(model, typed, own_history):
    kept = line_editor.history()
    own_history.unlink()
    own_history.mkdir()
    kept.append_string("a line")
    assert kept.get_strings() == ["a line"]
    code, out, _ = typed(model, keys="The\r")
    assert code == 0 and out
    own_history.rmdir()
    elsewhere = own_history.parent.parent / "elsewhere"
    own_history.symlink_to(elsewhere)
    line_editor.history().append_string("a line")
    assert not elsewhere.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no conversation"),
        ("[1]", "expected rkf_conversation"),
        ('{"rkf_conversation": 2, "messages": []}', "expected version 1, got 2"),
        ('{"rkf_conversation": 1, "messages": [], "x": 1}', "nothing but a list"),
        ('{"rkf_conversation": 1, "messages": [{"role": "user"}]}', "message 1: expected a role and a content"),
        ('{"rkf_conversation": 1, "messages": [{"role": "user", "content": [1]}]}', "message 1: expected text"),
        ('{"rkf_conversation": 1, "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogates not allowed"),
        ('{"rkf_conversation": 1, "messages": [{"role": "user", "content": "x"}]}', "has no answer"),
        ('{"rkf_conversation": 1, "messages": [{"role": "assistant", "content": "x"}]}', "expected the role user"),
        ('{"rkf_conversation": 1, "messages": ' + "[" * 100_000, "nested too deep"),
    ],
)
def test_other_files_are_no_conversations(tmp_path, text, said):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=said) as refused:
        read_conversation(path)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)


def test_directions_and_controls_in_a_line_are_shown_as_one_character_each():
    assert masked("a\u202eb\x1b[31mc\u2066\td") == "a\ufffdb\ufffd[31mc\ufffd\td"


PROMPT = r"\r?>[^>]*\x1b\[\?25h"  # it moves the cursor instead of writing a space


@contextmanager
def at_prompt(*arguments):
    terminal = Terminal(*arguments)
    terminal.wait_for(PROMPT)
    yield terminal
    assert "Traceback" not in terminal.screen


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(model):
    with at_prompt("chat", model, "--max-tokens", "2000") as terminal:
        terminal.type("The capital?\r")
        terminal.wait_for(r"\n[^\x1b\r\n>]{2}")
        terminal.interrupt()
        terminal.wait_for(r"\(stopped\)")
        terminal.wait_for(PROMPT)
        terminal.type("half")
        time.sleep(0.2)
        terminal.type("\x03")
        terminal.wait_for("Ctrl-D leaves")
        terminal.wait_for(PROMPT)
        terminal.type("\x04")
        assert terminal.finish() == 0


def test_sigterm_at_the_prompt_ends_the_chat(model):
    with at_prompt("chat", model) as terminal:
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.finish() == 130
