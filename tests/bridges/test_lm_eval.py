"""lm-evaluation-harness on local tasks: the scores of its own `hf` model on the same weights."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from click.testing import CliRunner
from lm_eval.tasks import TaskManager

from rkf.bridges.harness import tasks
from rkf.cli import cli
from rkf.converters.export import export_hf
from rkf.converters.pipeline import convert
from rkf.errors import UsageError
from tests.families.models import model_of, save

CHOICES = """
task: small_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/choices.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXTS = """
task: small_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/choices.jsonl"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}} {{{{endings[0]}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
ANSWERS = """
task: small_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/choices.jsonl"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{endings[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Task files and their items."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["one", "two", "three", "four", "five", "six"]
    items = []
    for i in range(12):
        endings = [f" {words[(i + n) % 6]} {n}" for n in range(4)]
        items.append({"question": f"say {words[i % 6]} and", "endings": endings, "label": i % 4})
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, text in (("choices", CHOICES), ("texts", TEXTS), ("answers", ANSWERS)):
        (tmp_path / f"{name}.yaml").write_text(text.format(folder=tmp_path))
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # of the harness and its data sets
def test_the_scores_of_the_hf_model(folder: Path) -> None:
    save(model_of("llama"), folder / "model")
    convert(folder / "model", folder / "m.rkf", recipe="dense")
    export_hf(folder / "m.rkf", folder / "dense")
    names = ["small_choices", "small_texts", "small_answers"]
    found = tasks(folder / "m.rkf", tasks=",".join(names), include_path=folder, exact=True, batch_size=5)
    expected = lm_eval.simple_evaluate(
        "hf", model_args=f"pretrained={folder / 'dense'},dtype=float32", tasks=names, device="cpu", bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder)), log_samples=False,
    )  # fmt: skip
    for name in names:
        scores: dict[str, Any] = expected["results"][name]
        wanted = {key: value for key, value in scores.items() if isinstance(value, float)}
        assert wanted and {key: found[name][key] for key in wanted} == pytest.approx(wanted, abs=1e-4)


def test_the_command_line_of_the_harness(folder: Path) -> None:
    convert(save(model_of("llama"), folder / "model"), folder / "m.rkf", k=16)
    arguments = ["--model", "rkf", "--model_args", f"path={folder / 'm.rkf'}", "--include_path", str(folder)]
    command = [sys.executable, "-m", "rkf.bridges.lm_eval", *arguments, "--tasks", "small_choices", "--limit", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "|small_choices|" in done.stdout and "rkf ({'path'" in done.stdout


@pytest.mark.filterwarnings("ignore")
def test_the_command(folder: Path) -> None:
    convert(save(model_of("llama"), folder / "model"), folder / "m.rkf", k=16)
    arguments = ["eval", "tasks", str(folder / "m.rkf"), "--include-path", str(folder), "--limit", "4", "--tasks"]
    done = CliRunner().invoke(cli, [*arguments, "small_choices", "--json"])
    assert done.exit_code == 0, done.output
    assert 0 <= json.loads(done.stdout)["small_choices"]["acc,none"] <= 1
    with pytest.raises(UsageError, match="no task 'nothing'"):
        tasks(folder / "m.rkf", tasks="nothing")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "damaged"),
    [("choices.jsonl", "{"), ("choices.jsonl", '{"question": 1}'), ("choices.yaml", "{{nothing.at}}")],
)
def test_a_task_that_fails_is_one_line(folder: Path, name: str, damaged: str) -> None:
    """Whatever the library of data sets or a template raises."""
    convert(save(model_of("llama"), folder / "model"), folder / "m.rkf", k=16)
    if name.endswith("yaml"):
        damaged = (folder / name).read_text().replace("{{question}}", damaged)
    (folder / name).write_text(damaged)
    with pytest.raises(UsageError, match=r"tasks small_choices: lm-evaluation-harness fails: [A-Z]"):
        tasks(folder / "m.rkf", tasks="small_choices", include_path=folder)
