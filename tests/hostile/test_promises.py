"""The promises of SECURITY.md that no other hostile test checks: what opening touches, what later versions may add."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rkf
from rkf.errors import UnsupportedError
from rkf.file.verify import verify
from rkf.format.constants import KNOWN_REQUIRED
from tests.format.build import write_model
from tests.hostile import strict
from tests.hostile.forge import mutate
from tests.hostile.reading import read_all
from tests.spec import reference
from tests.spec.document import VECTORS

# Events of Python's audit hooks that open, run or reach something.
WATCHED = (
    *("open", "os.open", "exec", "compile", "import", "pickle.find_class", "marshal.loads", "os.system", "os.exec"),
    *("os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen", "os.listdir", "os.scandir"),
)


class Watch:
    """Records events while `on`; an audit hook stays for the life of the process."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[tuple[str, Any]] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in WATCHED:
            self.seen.append((event, arguments[0] if arguments else None))


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def test_loading_opens_one_file_and_runs_nothing(watch: Watch, tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "model.rkf",
        blobs={
            "chat_template.jinja": b"{{ cycler.__init__.__globals__.os.system('touch owned') }}",
            "tokenizer.json": b'{"model": {"vocab": {}}, "added_tokens": []}',
        },
    )
    verify(path)  # triggers the late imports
    watch.seen.clear()
    watch.on = True
    verify(path)
    read_all(path)
    watch.on = False
    assert {(event, str(name)) for event, name in watch.seen} == {("open", str(path))}


def test_an_index_opens_its_parts_and_nothing_else(watch: Watch) -> None:
    index = VECTORS / "parts.rkf"
    read_all(index)
    watch.seen.clear()
    watch.on = True
    read_all(index)
    watch.on = False
    parts = {index, *(VECTORS / f"parts-{number:05}-of-00005.rkf" for number in range(1, 6))}
    assert {(event, str(name)) for event, name in watch.seen} == {("open", str(path)) for path in parts}


@pytest.mark.parametrize("name", ("everything", "zstd"))
def test_what_a_later_minor_version_may_add(name: str, sources: dict[str, bytes], tmp_path: Path) -> None:
    """Another minor version, optional bits and keys that begin with x-: the weights are the same."""
    path = tmp_path / "later.rkf"
    edits = {"superblock/minor": 9, "superblock/optional": (1 << 64) - 1, "directory/metadata/new": {"a": [1]}}
    for place in (
        "",
        "tensors/head/",
        "tensors/alias/",
        "tensors/head/values/",
        "tensors/head/exceptions/",
        "sections/0/",
    ):
        edits[f"directory/{place}x-new"] = ["anything", 1.5]
    edits["directory/tensors/body/stats"] = {"error": 0.5, "x-new": "anything"}
    path.write_bytes(mutate(sources[name], edits))
    with rkf.open(path) as container:
        assert container.tensors["body"].stats == {"error": 0.5}
    assert strict.read(path).keys() == container.tensors.keys()
    old, new = read_all(VECTORS / f"{name}.rkf"), read_all(path)
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[tensor], new[tensor]) for tensor in old)
    assert reference.read(path).keys() == old.keys()


@pytest.mark.parametrize("bit", [bit for bit in range(64) if not KNOWN_REQUIRED >> bit & 1])
def test_every_required_feature_is_named(bit: int, sources: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "later.rkf"
    path.write_bytes(mutate(sources["everything"], {"superblock/required": 1 << bit, "superblock/minor": 1}))
    with pytest.raises(UnsupportedError, match=rf"\[{bit}\]"):
        read_all(path)
