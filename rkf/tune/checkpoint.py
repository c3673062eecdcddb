"""Files beside the output from which a tuning run resumes: the lesson, once, and the learner after every step.

There are two safetensors files in `OUT.tuning/`. A fingerprint of inputs and options binds each to its run, and a hash
over tensors and numbers is checked before anything is used.
"""

from __future__ import annotations

from contextlib import suppress
from math import isfinite
from pathlib import Path

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rkf.errors import CorruptError, UsageError
from rkf.file.atomic import partial, replacing, reporting
from rkf.file.private import private_folder
from rkf.tune.loop import Learner

_LESSON, _STATE = "lesson.safetensors", "state.safetensors"
_VERSION = "tuning 1"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Checkpoint:
    """The folder of one run. lesson, run: hashes; runs with equal ones may use each other's lesson, or resume from each
    other's state. Raises OutputError if it cannot write, CorruptError for a damaged file.
    """

    def __init__(self, out: Path, lesson: str, run: str, resume: bool) -> None:
        self._folder, self._hashes = out.with_name(out.name + ".tuning"), {_LESSON: lesson, _STATE: run}
        private_folder(self._folder)
        if not resume:
            self._empty()

    def lesson(self, vocab: int, width: int) -> tuple[Tensor, Tensor] | None:
        """(ids, hidden), if an earlier run finished them. vocab: ids are below; width: of hidden states."""
        found = self._read(_LESSON)
        if found is None:
            return None
        tensors, _ = found
        ids, hidden = tensors.get("ids"), tensors.get("hidden")
        if ids is None or ids.dtype != torch.int64 or ids.ndim != 2 or not ((ids >= 0) & (ids < vocab)).all():
            raise self._damaged(_LESSON, "expected token ids")
        if hidden is None or hidden.dtype != torch.float32 or hidden.shape != (*ids.shape, width):
            raise self._damaged(_LESSON, f"expected hidden states of {width} numbers")
        return ids, hidden

    def save_lesson(self, ids: Tensor, hidden: Tensor) -> None:
        self._write(_LESSON, {"ids": ids.contiguous(), "hidden": hidden.contiguous()}, {})

    def restore(self, learner: Learner) -> float | None:
        """Restore the state of an earlier run. The seconds that it had spent, or None if there was none."""
        found = self._read(_STATE)
        if found is None:
            return None
        tensors, numbers = found
        forms = {
            f"{i}.{key}": torch.Size(()) if key == "step" else parameter.shape
            for i, parameter in enumerate(learner.parameters())
            for key in ("value", "best", "step", *_MOMENTS)
        }
        for name, shape in forms.items():
            each = tensors.get(name)
            if each is None or each.shape != shape or each.dtype != torch.float32 or not each.isfinite().all():
                raise self._damaged(_STATE, f"{name}: expected finite numbers of shape {list(shape)}")
        try:
            step, stale = int(numbers["step"]), int(numbers["stale"])
            before, best, spent = (float(numbers[key]) for key in ("before", "best", "spent"))
        except (KeyError, ValueError) as error:
            raise self._damaged(_STATE, f"a number is missing ({error})") from error
        if min(step, stale) < 0 or not 0 <= spent < float("inf") or not isfinite(before) or not isfinite(best):
            raise self._damaged(_STATE, "numbers out of range")
        state = learner.optimizer.state_dict()
        for i, parameter in enumerate(learner.parameters()):
            parameter.data.copy_(tensors[f"{i}.value"])
            learner.best_values.append(tensors[f"{i}.best"].to(parameter.device))
            state["state"][i] = {key: tensors[f"{i}.{key}"] for key in ("step", *_MOMENTS)}
        learner.optimizer.load_state_dict(state)
        learner.step, learner.stale, learner.before, learner.best = step, stale, before, best
        return spent

    def save(self, learner: Learner, spent: float) -> None:
        moments = learner.optimizer.state_dict()["state"]
        tensors: dict[str, Tensor] = {}
        for i, parameter in enumerate(learner.parameters()):
            tensors |= {f"{i}.value": parameter.detach(), f"{i}.best": learner.best_values[i]}
            tensors |= {f"{i}.{key}": moments[i][key] for key in ("step", *_MOMENTS)}
        numbers: dict[str, object] = {
            "step": learner.step,
            "stale": learner.stale,
            "before": learner.before,
            "best": learner.best,
        }
        self._write(_STATE, tensors, numbers | {"spent": spent})

    def remove(self) -> None:
        self._empty()
        with suppress(OSError):
            self._folder.rmdir()

    def _empty(self) -> None:
        """Delete single files: the user may own a folder of this name."""
        for path in (self._folder / _LESSON, self._folder / _STATE):
            with reporting(path):
                path.unlink(missing_ok=True)
                partial(path).unlink(missing_ok=True)

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        path = self._folder / name
        if not path.exists():
            return None
        if path.is_symlink() or not path.is_file():
            raise self._damaged(name, "not a file")
        try:
            with safe_open(path, "pt") as file:
                numbers = file.metadata() or {}
                if numbers.get("fingerprint") != self._hashes[name]:
                    raise UsageError(
                        f"{path}: made by a run with other inputs or options: omit --resume to start again"
                    )
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise self._damaged(name, str(error)) from error
        if numbers.pop("blake3", None) != _digest(tensors, numbers):
            raise self._damaged(name, "its hash does not match")
        return tensors, numbers

    def _damaged(self, name: str, problem: str) -> CorruptError:
        return CorruptError(f"{self._folder / name}: damaged ({problem}): omit --resume to start again")

    def _write(self, name: str, tensors: dict[str, Tensor], numbers: dict[str, object]) -> None:
        told = {key: repr(value) for key, value in numbers.items()} | {"fingerprint": self._hashes[name]}
        whole = {key: torch.as_tensor(value).cpu().contiguous() for key, value in tensors.items()}
        with replacing(self._folder / name, force=True, private=True) as output:
            output.write(save(whole, told | {"blake3": _digest(whole, told)}))


def _digest(tensors: dict[str, Tensor], numbers: dict[str, str]) -> str:
    """The hash that a file carries of its own contents, and of the version of their form."""
    digest = blake3(repr((_VERSION, sorted(numbers.items()))).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
