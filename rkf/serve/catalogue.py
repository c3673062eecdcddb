"""The models of a server by name: each file is opened once, when the first request for it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import time
from typing import Any

from anyio import to_thread

from rkf.errors import RkfError, UsageError
from rkf.file.container import open_file
from rkf.runtime.engine import Engine
from rkf.runtime.memory_limit import default_memory_bytes
from rkf.runtime.model import Model, load
from rkf.serve.output_forms import OutputForms
from rkf.serve.refusals import Refused, log

KEPT = 64  # beginnings; memory bounds them too


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The options of every model's engine; `rkf serve` explains them."""

    context: int | None = None
    parallel: int = 16
    queue: int = 256
    memory_bytes: int | None = None


class Served:
    """A model that is ready, with its engine. open_answers: those under way, in the eyes of the event loop."""

    def __init__(self, name: str, model: Model, options: EngineOptions) -> None:
        self.name, self.model, self.options, self.open_answers = name, model, options, 0
        self.engine = Engine(
            model.backend,
            context=options.context,
            parallel=options.parallel,
            memory_bytes=options.memory_bytes or default_memory_bytes(),
            kept=KEPT,
        )
        with suppress(RkfError):  # starts the template's process, for which the first request need not wait then
            model.chat_ids([{"role": "user", "content": "."}])

    @cached_property
    def output_forms(self) -> OutputForms:
        return OutputForms.of(self.model.tokenizer)


class Catalogue:
    """Models by name. paths: the files; load_options: keywords of `rkf.load`."""

    def __init__(self, paths: Mapping[str, Path], load_options: Mapping[str, Any], options: EngineOptions) -> None:
        self.paths = dict(paths)
        self.created = int(time())
        self._load_options, self._options = load_options, options
        self._ready: dict[str, Served] = {}
        self._loading = asyncio.Lock()

    @property
    def ready(self) -> Mapping[str, Served]:
        """The models that are loaded, by name."""
        return self._ready

    async def get(self, name: str | None) -> Served:
        """The model of a name, loaded now if need be. None: the only one."""
        if name is None:
            if len(self.paths) > 1:
                raise Refused(400, f"model: expected one of {', '.join(self.paths)}", param="model")
            name = next(iter(self.paths))
        self.check(name)
        if name not in self._ready:
            async with self._loading:
                if name not in self._ready:
                    await to_thread.run_sync(self.load, name)
        return self._ready[name]

    def load(self, name: str) -> None:
        """Load a model that is not loaded. Raises the errors of `rkf.load`."""
        log.info("loading %s from %s", name, self.paths[name])
        self._ready[name] = Served(name, load(self.paths[name], **self._load_options), self._options)

    def check(self, name: str) -> None:
        """Refused 404: there is no model of this name."""
        if name not in self.paths:
            known = ", ".join(self.paths)
            raise Refused(404, f"model {name[:100]!r}: expected one of {known}", param="model", code="model_not_found")

    def close(self) -> None:
        """Unmap the files."""
        for served in self._ready.values():
            served.model.close()


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """Files by the names under which they are served: theirs, without the ending. Each must be an rkf file.

    UsageError: two have one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise UsageError(f"{path}: the name {path.stem} is taken by {found[path.stem]}: rename one of them")
        try:
            open_file(path, check="structure").close()
        except IsADirectoryError:
            raise UsageError(f"{path}: expected a model file, got a folder") from None
        found[path.stem] = path
    if not found:
        raise RkfError("no model: name at least one file")
    return found
