"""Families of models are named in converters/families/ alone; runtimes and tools know programs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The reader of 1.0 files, whose metadata names an architecture; and GGUF's names of tokenizers, which are no families.
EXCEPT = {
    "rkf/model/first_form.py",
    "converters/gguf_tokenizer.py",
    "converters/pretokenizers.py",
    "converters/tokenizer_export.py",
}
_NAME = re.compile(
    r"llama(?!\.cpp|_cpp|-cpp|-gguf-split|FileType)|mistral|mixtral|qwen|gemma|phi3|olmo|granite|glm4|exaone|cohere|"
    r"seed_oss|ernie|smollm3|starcoder|stablelm|nemotron|neox|deepseek|apertus|arcee",
    re.IGNORECASE,
)
FILES = [
    path
    for room in ("rkf", "runtime", "converters")
    for path in sorted((ROOT / room).rglob("*.py"))
    if path.relative_to(ROOT).as_posix() not in EXCEPT and path.parent.name != "families"
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_family_is_named(path: Path) -> None:
    named = [line.strip() for line in path.read_text("utf-8").splitlines() if _NAME.search(line)]
    assert not named
