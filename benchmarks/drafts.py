"""What a draft model gains: answers with and without it, in turn, on a chat and on editing code. Ends in one JSON line.

    python -m benchmarks.drafts MODEL DRAFT [--threads N] [--tokens N] [--rounds N]

Each round asks both models the same; the texts must be equal. Prompt lookup is on in both. Rates are those of decoding.
"""

from __future__ import annotations

import json
import statistics
from argparse import ArgumentParser

import rkf
from rkf.runtime.model import Model

CODE = """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)


def variance(values):
    middle = mean(values)
    total = 0
    for value in values:
        total += (value - middle) ** 2
    return total / len(values)
"""
TASKS = {
    "chat": ("Explain in a few sentences why the sky is blue and sunsets are red.", {"temperature": 0}),
    "chat, sampled": ("Give me three ideas for a rainy weekend.", {"temperature": 0.7, "top_p": 0.9, "seed": 1}),
    "edit": (
        f"Rewrite this with type hints and docstrings. Give the code alone.\n\n```python\n{CODE}```",
        {"temperature": 0},
    ),
}


def answer(model: Model, task: str, tokens: int) -> tuple[list[int], float]:
    """The tokens of an answer, and tokens a second of decoding."""
    prompt, options = TASKS[task]
    generation = model.stream(prompt, max_tokens=tokens, **options)
    for _ in generation:
        pass
    return generation.ids, (generation.stats.tokens - 1) / generation.stats.decode_s


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("draft")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {task: {"plain": [], "draft": []} for task in TASKS}
    with (
        rkf.load(options.model, threads=options.threads) as plain,
        rkf.load(options.model, threads=options.threads, draft=options.draft) as drafted,
    ):
        for _ in range(options.rounds):
            for task, rates in found.items():
                texts = []
                for name, model in (("plain", plain), ("draft", drafted)):
                    ids, rate = answer(model, task, options.tokens)
                    rates[name].append(rate)
                    texts.append(ids)
                if texts[0] != texts[1]:
                    raise SystemExit(f"{task}: the texts differ")
    for task, rates in found.items():
        ratios = [b / a for a, b in zip(rates["plain"], rates["draft"], strict=True)]
        print(
            f"{task:14} {statistics.median(rates['plain']):6.1f} tok/s, with a draft {statistics.median(ratios):.2f} x"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
