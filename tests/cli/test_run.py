"""`rkf run` as a user types it, on a tiny model."""

import os
import re
import subprocess

import pytest
from click.testing import CliRunner

import rkf
from rkf import __version__
from rkf.cache import cache_dir
from rkf.cli import cli
from rkf.commands import answering
from rkf.commands.default_model import NAME
from tests.cli.talking import Terminal, command, cut, run
from tests.runtime import tiny

CONFIG = tiny.config(context_length=2048, eos_ids=())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny.write(tmp_path_factory.mktemp("model") / "tiny.rkf", CONFIG, tiny.weights(CONFIG))
    with rkf.load(path) as ready:  # compiles missing kernels here, so the message is not in a test's stderr
        ready.generate("The", max_tokens=2)
    return path


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
    for arguments in ([], ["-"]):
        done = subprocess.run(
            command("run", model, "--max-tokens", "6", *arguments),
            input=path.read_bytes(),
            capture_output=True,
            check=False,
        )
        assert done.stdout.decode() == wanted


def test_a_dash_alone_reads_the_prompt_for_the_default_model(model, monkeypatch):
    monkeypatch.setattr(answering, "model_path", lambda path: model if path is None else path)
    wanted = CliRunner().invoke(cli, ["run", str(model), "--prompt", "The", "--max-tokens", "5"])
    done = CliRunner().invoke(cli, ["run", "-", "--max-tokens", "5"], input="The\n")
    assert (done.exit_code, done.stdout) == (0, wanted.stdout)
    done = CliRunner().invoke(cli, ["run", "-", "--prompt", "The"], input="The\n")
    assert done.exit_code == 2 and "- reads the prompt from stdin" in done.stderr


def test_images_are_refused_by_their_kind(model, tmp_path):
    path = tmp_path / "photo"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    done = CliRunner().invoke(cli, ["run", str(model), "--prompt-file", str(path)])
    assert (done.exit_code, done.stderr) == (
        2,
        f"rkf: {path}: expected UTF-8 text, got a PNG image; rkf reads text alone\n",
    )


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
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(
        f"rkf: {schema}: json_schema: Invalid type"
    )
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stop", ""], "--stop: expected a text that is not empty"),
        (["--template-arg", "messages=1"], "messages comes from the conversation"),
        (["--json-schema", "FILE"], "FILE: json_schema: "),
        (["--grammar", "FILE"], "FILE: grammar: "),
        (["--host", ""], "--host: expected an address"),
        (["--allow-origin", "example.com"], "--allow-origin: expected an origin such as"),
        (["--allow-origin", "https://example.com/page"], "--allow-origin: expected an origin such as"),
    ],
)
def test_options_are_checked_before_a_model_is_opened(tmp_path, options, said):
    (tmp_path / "form").write_text("{")
    given = [str(tmp_path / "form") if each == "FILE" else each for each in options]
    for verb in ("run", "chat", "serve"):
        if verb == "serve" or options[0] not in ("--host", "--allow-origin"):
            done = CliRunner().invoke(cli, [verb, *(["--prompt", "x"] if verb == "run" else []), "none.rkf", *given])
            assert done.exit_code == 2 and said.replace("FILE", str(tmp_path / "form")) in done.output, done.output
            assert done.output.count("\n") == 1


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


def test_ctrl_c_ends_run_with_130(model):
    terminal = Terminal("run", model, "--prompt", "The", "--raw", "--max-tokens", "2000")
    terminal.wait_for(r"\w")
    terminal.interrupt()
    assert terminal.finish() == 130
    assert "Traceback" not in terminal.screen
