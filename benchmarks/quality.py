"""KL divergence, perplexity and agreement against file size: rkf and llama.cpp's types on the same source and windows.

    python -m benchmarks.degrid SRC.gguf SOURCE
    python -m benchmarks.quality SOURCE TEXT WORK --peer PYTHON [--windows 64] [--sizes 80MB 91MB]

SOURCE: a Hugging Face folder. TEXT: held out: calibration never sees it. WORK: a folder for the models made; what is
there already is used again. PYTHON: an interpreter that has llama-cpp-python. The importance matrix of the peers comes
from the same text as our calibration: what the source model writes. Prints a Markdown table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rkf.calibration import Calibrate, save
from rkf.commands.output import byte_count
from rkf.converters.export import export_gguf
from rkf.converters.names import to_gguf
from rkf.converters.pipeline import convert
from rkf.converters.source import open_source
from rkf.eval import reference
from rkf.eval.distributions import log_softmax
from rkf.eval.divergence import divergence, sampled, score, summary, windows_of
from rkf.eval.reference import Window
from rkf.runtime.model import load

PEER = Path(__file__).with_name("peer_gguf.py")
TYPES = ("Q3_K_M", "IQ4_XS", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K")
_COLUMNS = ("MB", "KLD", "±", "ppl ratio", "top-1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--sizes", nargs="*", default=["70MB", "80MB", "91MB", "105MB"])
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True)
    windows = _reference(options)
    tokens = _tokens(options)
    rows = []
    for name, path, figures in [*_ours(options, tokens, windows), *_peers(options, tokens, windows)]:
        rows.append({"name": name, "bytes": path.stat().st_size, **figures})
        print(_line(rows[-1]), flush=True)
    print("\n" + table(rows))
    print(json.dumps({"windows": len(windows), "text": options.text.name, "models": rows}))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, by size."""
    head = f"| model | {' | '.join(_COLUMNS)} |\n|---|{'---:|' * len(_COLUMNS)}\n"
    return head + "\n".join(_line(row) for row in sorted(rows, key=lambda row: row["bytes"]))


def _line(row: dict[str, Any]) -> str:
    cells = (
        row["name"],
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['kld']:.4f}",
        f"{row['kld_stderr']:.4f}",
        f"{row['ppl_ratio']:.4f}",
        f"{row['top1']:.1%}",
    )
    return f"| {' | '.join(cells)} |"


def _reference(options: argparse.Namespace) -> list[Window]:
    dense, stored = options.work / "dense.rkf", options.work / f"{options.text.stem}-{options.windows}.kld"
    if not dense.exists():
        convert(options.source, dense, recipe="dense")
    if not stored.exists():
        with load(dense, exact=True) as model:
            made = windows_of(model, options.text.read_text(encoding="utf-8"), windows=options.windows)
            reference.write(stored, [sampled(window, number) for number, window in enumerate(made)])
    return reference.read(stored)


def _tokens(options: argparse.Namespace) -> Path:
    kept: Path = options.work / "calibration.tokens"
    if not kept.exists():
        save(kept, Calibrate()(open_source(options.source)).tokens)
    return kept


def _ours(options: argparse.Namespace, tokens: Path, windows: list[Window]) -> Iterator[tuple[str, Path, Any]]:
    for size in options.sizes:
        path = options.work / f"rkf-{size}.rkf"
        if not path.exists():
            convert(options.source, path, size=byte_count(size), calibrate=Calibrate(tokens))
        with load(path) as model:
            yield f"rkf --size {size}", path, divergence(model, windows)


def _peers(options: argparse.Namespace, tokens: Path, windows: list[Window]) -> Iterator[tuple[str, Path, Any]]:
    f16, importance, ids = (options.work / name for name in ("f16.gguf", "importance.npz", "tokens.npy"))
    if not f16.exists():
        export_gguf(options.work / "dense.rkf", f16)
    if not importance.exists():
        _write_importance(options.source, tokens, importance)
    np.save(ids, np.stack([window.ids for window in windows]).astype(np.uint32))
    for type_name in TYPES:
        path = options.work / f"{type_name}.gguf"
        if not path.exists():
            subprocess.run(
                [options.peer, PEER, "quantize", f16, path, type_name, importance], check=True, capture_output=True
            )
        yield type_name, path, _peer_divergence(options.peer, path, ids, windows)


def _write_importance(source: Path, tokens: Path, out: Path) -> None:
    """The mean squares of every matrix' inputs, as llama.cpp's imatrix has them."""
    found = {}
    for moments in Calibrate(tokens)(open_source(source)).moments():
        found |= {to_gguf(name): np.diagonal(each).astype(np.float32) for name, each in moments.items()}
    np.savez(out, **found)


def _peer_divergence(python: Path, path: Path, ids: Path, windows: list[Window]) -> dict[str, float]:
    scores, vocab = [], open_source(path).config.vocab_size
    with subprocess.Popen([python, PEER, "logits", path, ids], stdout=subprocess.PIPE) as peer:
        for window in windows:
            raw = peer.stdout.read(4 * len(window.target) * vocab)
            scores.append(score(window, log_softmax(np.frombuffer(raw, np.float32).reshape(-1, vocab))))
    return summary(np.concatenate(scores, axis=1), float(np.mean([window.noise for window in windows])))


if __name__ == "__main__":
    main()
