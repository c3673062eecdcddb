"""Every command: no output replaces a file that the call reads, and missing memory is one line."""

import pytest
from click.testing import CliRunner

from rkf.cli import cli
from rkf.commands.options import answer_keywords
from tests.runtime import tiny

CONFIG = tiny.config()


def rkf(*arguments):
    return CliRunner().invoke(cli, [*map(str, arguments)])


@pytest.fixture
def files(tmp_path):
    """A model and files that are never opened: the guards come before any work."""
    tiny.write(tmp_path / "m.rkf", CONFIG, tiny.weights(CONFIG))
    for name in ("text.txt", "recipe.toml", "reference.rkf", "source.gguf"):
        (tmp_path / name).write_text("kept", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("output", "arguments"),
    [
        ("text.txt", ["calibrate", "source.gguf", "text.txt", "--text", "text.txt", "--force"]),
        ("m.rkf", ["eval", "kld", "m.rkf", "--reference", "reference.rkf", "--text", "text.txt", "--save", "m.rkf"]),
        ("text.txt", ["eval", "kld", "m.rkf", "--reference", "m.rkf", "--text", "text.txt", "--save", "text.txt"]),
        ("reference.rkf", ["tune", "m.rkf", "reference.rkf", "--reference", "reference.rkf"]),
        ("text.txt", ["tune", "m.rkf", "text.txt", "--reference", "reference.rkf", "--data", "text.txt"]),
        ("m.rkf", ["pack", "m.rkf", "m.rkf"]),
        ("m.rkf", ["export", "gguf", "m.rkf", "m.rkf"]),
    ],
)
@pytest.mark.parametrize("linked", [False, True])
def test_no_output_is_an_input(files, monkeypatch, output, arguments, linked):
    monkeypatch.chdir(files)
    if linked:  # by another name of the same file
        (files / "link").hardlink_to(files / output)
        at = len(arguments) - 1 - arguments[::-1].index(output)
        arguments = [*arguments[:at], "link", *arguments[at + 1 :]]
    before = (files / output).read_bytes()
    if "--force" not in arguments:
        arguments = [*arguments, "--force"]
    done = rkf(*arguments)
    assert done.exit_code == 1 and "the output is the input" in done.stderr, done.output
    assert (files / output).read_bytes() == before


def test_a_template_argument_that_no_json_reader_takes_is_text():
    deep = "[" * 100_000
    assert answer_keywords({"template_arg": (f"a={deep}",)}) == {"template_args": {"a": deep}}


def test_threads_that_cannot_be_started_are_one_line(files, monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refused)
    done = rkf("verify", files / "m.rkf")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "rkf: the system allows no more threads: close other programs\n"


def test_memory_that_is_not_there_is_one_line(files, monkeypatch):
    def hungry(*_, **__):
        raise MemoryError

    monkeypatch.setattr("rkf.file.verify.verify", hungry)
    done = rkf("verify", files / "m.rkf")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("rkf: not enough memory") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["split", "p.rkf", "PART", "--part-size", "1MB"],
        ["join", "p.rkf", "PART"],
        ["pack", "p.rkf", "PART"],
        ["unpack", "p.rkf", "PART"],
        ["export", "gguf", "p.rkf", "PART"],
        ["tune", "p.rkf", "PART", "--reference", "reference.rkf"],
        ["tune", "m.rkf", "PART", "--reference", "p.rkf"],
        ["eval", "kld", "p.rkf", "--reference", "reference.rkf", "--text", "text.txt", "--save", "PART"],
        ["eval", "kld", "m.rkf", "--reference", "p.rkf", "--text", "text.txt", "--save", "PART"],
    ],
)
def test_no_output_is_a_part_of_an_input(files, monkeypatch, arguments):
    monkeypatch.chdir(files)
    assert rkf("split", "m.rkf", "p.rkf", "--part-size", "20kB").exit_code == 0
    part = sorted(files.glob("p-*.rkf"))[-1]
    before = part.read_bytes()
    done = rkf(*[part.name if each == "PART" else each for each in arguments], "--force")
    assert done.exit_code == 1 and f"the output is the input {part.name}" in done.stderr, done.output
    assert part.read_bytes() == before


def test_no_output_is_a_file_of_an_adapter(files, monkeypatch):
    monkeypatch.chdir(files)
    (files / "adapter").mkdir()
    weights = files / "adapter" / "adapter_model.safetensors"
    weights.write_text("kept", encoding="utf-8")
    done = rkf(
        *("eval", "kld", "m.rkf", "--reference", "reference.rkf", "--text", "text.txt"),
        *("--adapter", "adapter", "--save", weights, "--force"),
    )
    assert done.exit_code == 1 and "the output is the input" in done.stderr, done.output
    assert weights.read_text(encoding="utf-8") == "kept"
