"""`tasks`: scores of a model on tasks of lm-evaluation-harness, in one call."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from rkf.errors import RkfError, UsageError

try:
    import lm_eval
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UsageError("this needs lm-eval, which is not installed: pip install 'rkf-llm[lm-eval]'") from error

from rkf.bridges.lm_eval import RkfLM


def tasks(
    path: str | PathLike[str],
    *,
    tasks: str,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Task -> name of a score ("acc,none", "acc_stderr,none", …) -> value.

    tasks: names, separated by commas. include_path: a folder with task files. options: as for `RkfLM`.
    Raises UsageError for an unknown task or one that fails (its files, its templates), and the errors of loading the
    file.
    """
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(f"no task {name!r} in lm-evaluation-harness or --include-path")
    model = RkfLM(str(path), **options)
    with model.model:
        try:
            found = lm_eval.simple_evaluate(
                model, tasks=list(names), num_fewshot=num_fewshot, limit=limit, apply_chat_template=apply_chat_template,
                task_manager=manager, bootstrap_iters=0, log_samples=False,
            )  # fmt: skip
        except (RkfError, OSError, MemoryError):
            raise
        except Exception as error:  # tasks are code of others, with data sets and templates of their own
            reason = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())
            raise UsageError(f"tasks {', '.join(names)}: lm-evaluation-harness fails: {reason}") from error
    return {
        name: {key: float(value) for key, value in scores.items() if isinstance(value, int | float)}
        for name, scores in found["results"].items()
    }
