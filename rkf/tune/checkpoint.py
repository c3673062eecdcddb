"""Files beside the output from which a tuning run resumes: the lesson, once, and the learner after every step.

There are two safetensors files in `OUT.tuning/`. A fingerprint of inputs and options binds each to its run.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rkf.errors import CorruptError, UsageError
from rkf.file.atomic import partial, replacing, reporting
from rkf.tune.loop import Learner

_LESSON, _STATE = "lesson.safetensors", "state.safetensors"


class Checkpoint:
    """The folder of one run. lesson, run: hashes; runs with equal ones may use each other's lesson, or resume from each
    other's state. Raises OutputError if it cannot write, CorruptError for a damaged file.
    """

    def __init__(self, out: Path, lesson: str, run: str, resume: bool) -> None:
        self._folder, self._hashes = out.with_name(out.name + ".tuning"), {_LESSON: lesson, _STATE: run}
        if not resume:
            self.remove()
        with reporting(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def lesson(self) -> tuple[Tensor, Tensor] | None:
        """(ids, hidden), if an earlier run finished them."""
        found = self._read(_LESSON)
        return None if found is None else (found[0]["ids"], found[0]["hidden"])

    def save_lesson(self, ids: Tensor, hidden: Tensor) -> None:
        self._write(_LESSON, {"ids": ids.contiguous(), "hidden": hidden.contiguous()}, {})

    def restore(self, learner: Learner) -> float | None:
        """Restore the state of an earlier run. The seconds that it had spent, or None if there was none."""
        found = self._read(_STATE)
        if found is None:
            return None
        tensors, numbers = found
        state = learner.optimizer.state_dict()
        for i, parameter in enumerate(learner.parameters()):
            parameter.data.copy_(tensors[f"{i}.value"])
            learner.best_values.append(tensors[f"{i}.best"].to(parameter.device))
            state["state"][i] = {key: tensors[f"{i}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        learner.optimizer.load_state_dict(state)
        learner.step, learner.stale = int(numbers["step"]), int(numbers["stale"])
        learner.before, learner.best = float(numbers["before"]), float(numbers["best"])
        return float(numbers["spent"])

    def save(self, learner: Learner, spent: float) -> None:
        moments = learner.optimizer.state_dict()["state"]
        tensors: dict[str, Tensor] = {}
        for i, parameter in enumerate(learner.parameters()):
            tensors |= {f"{i}.value": parameter.detach(), f"{i}.best": learner.best_values[i]}
            tensors |= {f"{i}.{key}": moments[i][key] for key in ("step", "exp_avg", "exp_avg_sq")}
        numbers: dict[str, object] = {
            "step": learner.step,
            "stale": learner.stale,
            "before": learner.before,
            "best": learner.best,
        }
        self._write(_STATE, tensors, numbers | {"spent": spent})

    def remove(self) -> None:
        """Delete single files: the user may own a folder of this name."""
        for path in (self._folder / _LESSON, self._folder / _STATE):
            with reporting(path):
                path.unlink(missing_ok=True)
                partial(path).unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        path = self._folder / name
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                numbers = file.metadata() or {}
                if numbers.get("fingerprint") != self._hashes[name]:
                    raise UsageError(
                        f"{path}: made by a run with other inputs or options: omit --resume to start again"
                    )
                return {key: file.get_tensor(key) for key in file.keys()}, numbers  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise CorruptError(f"{path}: damaged ({error}): omit --resume to start again") from error

    def _write(self, name: str, tensors: dict[str, Tensor], numbers: dict[str, object]) -> None:
        told = {key: repr(value) for key, value in numbers.items()} | {"fingerprint": self._hashes[name]}
        whole = {key: torch.as_tensor(value).cpu().contiguous() for key, value in tensors.items()}
        with replacing(self._folder / name, force=True) as output:
            output.write(save(whole, told))
