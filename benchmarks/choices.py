"""Makes multiple-choice items for `rkf eval choices` from a plain text.

    python -m benchmarks.choices TEXT OUT.jsonl [--items 400]

Each item is a stretch of words with its true continuation and three stretches from elsewhere in the same text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

CONTEXT, ENDING, ENDINGS = 24, 6, 4  # words, words, choices


def items(text: str, count: int) -> Iterator[dict[str, object]]:
    """The first `count` items of a text, fewer if it is short; deterministic."""
    words = text.split()
    length = CONTEXT + ENDING
    starts = range(0, len(words) - length + 1, length)
    for number, start in zip(range(count), starts, strict=False):
        random = np.random.Generator(np.random.Philox(key=number))
        others = random.choice([s for s in starts if s != start], ENDINGS - 1, replace=False)
        label = int(random.integers(ENDINGS))
        begins = [int(other) + CONTEXT for other in others]
        begins.insert(label, start + CONTEXT)
        yield {
            "context": " ".join(words[start : start + CONTEXT]),
            "endings": [" " + " ".join(words[begin : begin + ENDING]) for begin in begins],
            "label": label,
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=400)
    options = parser.parse_args()
    lines = [json.dumps(item) + "\n" for item in items(options.text.read_text(encoding="utf-8"), options.items)]
    options.out.write_text("".join(lines), encoding="utf-8")
