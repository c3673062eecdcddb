"""lm-evaluation-harness against the server: the scores that it gets in this process."""

import json

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from rkf.bridges.harness import tasks
from tests.bridges.test_lm_eval import ANSWERS, CHOICES
from tests.serve.running import running

NAMES = ["small_choices", "small_answers"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    items = [
        {"question": f"The capital of {n} is", "endings": [f" Paris {n}", f" the Seine {n}", " café"], "label": n % 3}
        for n in range(8)
    ]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, text in (("choices", CHOICES), ("answers", ANSWERS)):
        (tmp_path / f"{name}.yaml").write_text(text.format(folder=tmp_path))
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # of the harness and its data sets
@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_scores_are_those_of_this_process(folder, paths, kind):
    chat = kind == "local-chat-completions"
    names = NAMES[chat:]  # a chat has no log-probabilities of prompts
    wanted = tasks(paths["tiny"], tasks=",".join(NAMES), include_path=folder, batch_size=4)
    with running({"tiny": paths["tiny"]}) as port:
        path = "chat/completions" if chat else "completions"
        found = lm_eval.simple_evaluate(
            kind,
            model_args=f"model=tiny,base_url=http://127.0.0.1:{port}/v1/{path},num_concurrent=4,max_retries=1",
            tasks=names,
            bootstrap_iters=0,
            apply_chat_template=chat,
            task_manager=TaskManager(include_path=str(folder)),
            log_samples=True,
        )
    assert all(sample["resps"] for name in names for sample in found["samples"][name])
    if not chat:
        for name in names:
            scores = {key: found["results"][name][key] for key in wanted[name] if not key.startswith("alias")}
            assert scores == wanted[name]
