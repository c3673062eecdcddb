"""Every hostile file is refused: as it is, and with its hashes made good, by the rule and in the words that are due.

A re-sealed case meets the very check that it is for; taking that check away fails the case.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import rkf
from rkf.errors import BindingError, IntegrityError, NotRkfError, StructureError
from rkf.file.verify import verify
from tests.hostile import strict
from tests.hostile.cases import DIRECTORIES, NOT_RKF, SECTIONS, SUPERBLOCKS, Case
from tests.hostile.file_cases import BINDINGS, MODELS, VALUES, ZSTD
from tests.hostile.forge import mutate
from tests.hostile.program_cases import PROGRAMS
from tests.hostile.reading import LEVEL_ERRORS, decode_all, read_all
from tests.hostile.tensor_cases import CLUSTERS, TENSORS
from tests.spec.document import VECTORS, code, table

CASES = [*NOT_RKF, *SUPERBLOCKS, *DIRECTORIES, *SECTIONS, *TENSORS, *CLUSTERS, *ZSTD, *MODELS, *VALUES, *PROGRAMS]
SMALL = [case for case in CASES if not case.large]
LEVELS = {
    code(row[0])[0]: row[1]
    for document in ("rkf-1.md", "program.md")
    for row in table(document, "refusal", "level", "the file is refused if")
}
# What needs the meaning of 1.0 metadata or the whole of a file's content, which the reference reader leaves out.
NOT_OF_THE_REFERENCE = {"architecture", "model"} | {name for name, level in LEVELS.items() if level == "semantics"}


def ident(case: Case) -> str:
    return f"{case.refusal}: {case.name}"


def test_every_refusal_has_cases() -> None:
    # A prefix of ranks under unordered values is no file: tests/runtime/test_cpu_model.py asks a runtime for one.
    assert {case.refusal for case in [*CASES, *BINDINGS]} | {"progressive"} == set(LEVELS)
    names = [ident(case) for case in [*CASES, *BINDINGS]]
    assert not {name for name in names if names.count(name) > 1}


@pytest.mark.parametrize(
    "source", ("everything", "zstd", "model", "experts", "latent", "plain", "recurrent", "scan", "windows")
)
def test_sources_are_sound(source: str, sources: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "sound.rkf"
    path.write_bytes(mutate(sources[source], {}))
    assert path.read_bytes() == sources[source]
    verify(path)
    strict.read(path)


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_resealed(case: Case, sources: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "hostile.rkf"
    path.write_bytes(mutate(sources[case.source], case.edits))
    level = LEVELS[case.refusal]
    with pytest.raises(LEVEL_ERRORS[level]) as caught:
        verify(path) if level == "semantics" else read_all(path)
    assert type(caught.value) is LEVEL_ERRORS[level]
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and message.isprintable()
    assert case.mentions in message, message
    assert len(message) < 600 + len(str(path))
    if level == "semantics":
        read_all(path)


@pytest.mark.parametrize("case", SMALL, ids=ident)
def test_raw(case: Case, sources: dict[str, bytes], tmp_path: Path) -> None:
    """With the hashes as they were, the file is refused at open, whatever else is wrong with it."""
    path = tmp_path / "hostile.rkf"
    path.write_bytes(mutate(sources[case.source], case.edits, reseal=False))
    with pytest.raises((NotRkfError, StructureError, IntegrityError)):
        rkf.open(path)


@pytest.mark.parametrize("case", SMALL, ids=ident)
def test_structure_alone(case: Case, sources: dict[str, bytes], tmp_path: Path) -> None:
    """A reader that looked at no section refuses what it can see, and what it decodes anyway can do no harm."""
    path = tmp_path / "hostile.rkf"
    path.write_bytes(mutate(sources[case.source], case.edits))
    level = LEVELS[case.refusal]
    if level in ("integrity", "semantics"):
        with rkf.open(path, check="structure") as container:
            try:
                decode_all(container)
            except IntegrityError:
                assert level == "integrity"
    else:
        with pytest.raises(LEVEL_ERRORS[level]):
            rkf.open(path, check="structure")


@pytest.mark.parametrize("case", [case for case in SMALL if case.refusal not in NOT_OF_THE_REFERENCE], ids=ident)
def test_reference_reader_agrees(case: Case, sources: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "hostile.rkf"
    path.write_bytes(mutate(sources[case.source], case.edits))
    with pytest.raises(strict.Refused) as caught:
        if case.source == "regrouped":
            strict.read(VECTORS / "everything.rkf", path)
        else:
            strict.read(path)
    assert caught.value.args[0] == LEVELS[case.refusal]


@pytest.mark.parametrize("case", BINDINGS, ids=ident)
def test_binding(case: Case, sources: dict[str, bytes], tmp_path: Path) -> None:
    """A values file that is sound, and for another model."""
    path = tmp_path / "hostile.rkv"
    path.write_bytes(mutate(sources[case.source], case.edits))
    rkf.open(path).close()
    with pytest.raises(BindingError) as caught:
        rkf.open(VECTORS / "everything.rkf", values=path)
    assert str(path) in str(caught.value) and case.mentions in str(caught.value)
    with pytest.raises(strict.Refused) as refused:
        strict.read(VECTORS / "everything.rkf", path)
    assert refused.value.args[0] == "binding"
