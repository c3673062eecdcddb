"""KL divergence, perplexity and agreement against file size, for rkf, llama.cpp's types and NF4 from one source.

    python -m benchmarks.degrid SRC.gguf SOURCE
    python -m benchmarks.quality SOURCE WORK --text wiki.txt=64 --text code.txt=24 --peer PYTHON --out quality.json

SOURCE: a Hugging Face folder. The texts are held out: calibration never sees them. WORK: a folder for models and
results; existing ones are reused, so an interrupted run resumes. PYTHON: an interpreter that has llama-cpp-python. The
peers' importance matrix comes from the same text as our calibration, which the source model generates.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks import nf4
from benchmarks.report import ratios, table
from rkf.calibrate.calibration import Calibrate
from rkf.calibrate.kept import save
from rkf.calibrate.moments import SHRINKAGE
from rkf.cluster.allocation import coarse
from rkf.commands.output import byte_count
from rkf.converters.description import describe
from rkf.converters.export import export_gguf
from rkf.converters.families.layout import Origin
from rkf.converters.gguf_names import gguf_layout
from rkf.converters.pipeline import convert
from rkf.converters.rotated_source import RotatedSource
from rkf.converters.source import open_source
from rkf.eval import reference
from rkf.eval.distributions import log_softmax
from rkf.eval.divergence import divergence, sampled, score, summary, windows_of
from rkf.eval.reference import Window
from rkf.file.atomic import replacing
from rkf.runtime.model import load

PEER = Path(__file__).with_name("peer_gguf.py")
TYPES = ("Q3_K_M", "IQ4_XS", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K")
SIZES = ("70MB", "80MB", "91MB", "105MB", "112MB", "138MB")

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One model. make: writes the file if it does not exist and returns the bytes that it counts for."""

    name: str
    make: Callable[[], int]
    score: Callable[[list[Window]], Figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--text", action="append", required=True, metavar="FILE=WINDOWS")
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--sizes", nargs="*", default=SIZES)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = Bench(options.source, options.work, options.peer)
    contestants = [*bench.ours(options.sizes), *bench.peers(), bench.nf4()]
    results = {}
    for name, _, windows in (text.rpartition("=") for text in options.text):
        text = Path(name)
        rows = [bench.row(each, text, int(windows)) for each in contestants]
        results[text.stem] = {"windows": int(windows), "models": rows}
        print(f"\n## {text.stem}, {windows} windows\n\n{table(rows)}\n\n{ratios(rows)}", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


class Bench:
    """The models made from one source, in one folder."""

    def __init__(self, source: Path, work: Path, python: Path) -> None:
        self.source, self.work, self.python = source, work, python
        work.mkdir(exist_ok=True)
        label, fingerprint = work / "source", open_source(source).fingerprint
        if label.exists() and label.read_text(encoding="utf-8") != fingerprint:
            raise SystemExit(f"{work}: holds results of another source: choose another folder")
        label.write_text(fingerprint, encoding="utf-8")

    def row(self, contestant: Contestant, text: Path, windows: int) -> dict[str, Any]:
        """A line of the table, cached as `MODEL@TEXT-WINDOWS.json`."""
        kept = self.work / f"{contestant.name}@{text.stem}-{windows}.json"
        if not kept.exists():
            size = contestant.make()
            figures = contestant.score(self._windows(text, windows))
            row = {"name": contestant.name, "bytes": size, **figures}
            with replacing(kept) as output:
                output.write(json.dumps(row).encode())
            print(f"{contestant.name}: KLD {figures['kld']:.5f}", flush=True)
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found

    def ours(self, sizes: list[str]) -> Iterator[Contestant]:
        for size in sizes:
            path = self.work / f"rkf-{size}.rkf"

            def make(path: Path = path, size: str = size) -> int:
                if not path.exists():
                    convert(self.source, path, size=byte_count(size), calibrate=Calibrate(self._calibration()))
                return path.stat().st_size

            yield Contestant(f"rkf-{size}", make, lambda windows, path=path: _divergence(path, windows))

    def peers(self) -> Iterator[Contestant]:
        for kind in TYPES:
            path = self.work / f"{kind}.gguf"

            def make(path: Path = path, kind: str = kind) -> int:
                if not path.exists():
                    made = path.with_suffix(".partial")
                    self._peer("quantize", self._f16(), made, kind, self._importance())
                    made.replace(path)
                return path.stat().st_size

            yield Contestant(kind, make, lambda windows, path=path: self._peer_divergence(path, windows))

    def nf4(self) -> Contestant:
        path = self.work / "nf4.rkf"

        def make() -> int:
            return nf4.write(open_source(self.source), path)

        return Contestant("NF4", make, lambda windows: _divergence(path, windows))

    def _windows(self, text: Path, windows: int) -> list[Window]:
        stored = self.work / f"{text.stem}-{windows}.kld"
        if not stored.exists():
            with load(self._dense(), exact=True) as model:
                made = windows_of(model, text.read_text(encoding="utf-8"), windows=windows)
                reference.write(stored, [sampled(window, number) for number, window in enumerate(made)])
        return reference.read(stored)

    def _dense(self) -> Path:
        path = self.work / "dense.rkf"
        if not path.exists():
            convert(self.source, path, recipe="dense")
        return path

    def _calibration(self) -> Path:
        path = self.work / "calibration.npz"
        if not path.exists():
            source = open_source(self.source)
            made = Calibrate()(source)
            save(path, made.tokens, made.of(RotatedSource(source)).losses(coarse))
        return path

    def _f16(self) -> Path:
        path = self.work / "f16.gguf"
        if not path.exists():
            export_gguf(self._dense(), path)
        return path

    def _importance(self) -> Path:
        """The mean squares of every matrix's inputs, in the form of llama.cpp's imatrix. Not for mixtures."""
        path = self.work / "importance.npz"
        if not path.exists():
            source = open_source(self.source)
            config = json.loads(source.verbatim["config.json"])
            architecture = describe(config, source.label).family.gguf.architecture
            names = gguf_layout(architecture, lambda name: (Origin((name,)),))
            calibration = Calibrate(self._calibration())(source)
            found: dict[str, NDArray[np.float32]] = {}
            for moments in calibration.moments():
                for name, each in moments.items():
                    squares = np.diagonal(cast(NDArray[np.float64], each))
                    share = SHRINKAGE / calibration.tokens.size  # undone: llama.cpp does not shrink
                    squares = squares - share * squares.sum() / (1 + share * squares.size)
                    found[names(name)[0].names[0]] = squares.astype(np.float32)
            packed = io.BytesIO()
            np.savez(packed, **found)
            with replacing(path) as output:
                output.write(packed.getbuffer())
        return path

    def _peer(self, *arguments: object) -> None:
        subprocess.run([self.python, PEER, *map(str, arguments)], check=True, capture_output=True)

    def _peer_divergence(self, path: Path, windows: list[Window]) -> Figures:
        ids = self.work / "tokens.npy"
        np.save(ids, np.stack([window.ids for window in windows]).astype(np.uint32))
        scores, vocab = [], open_source(path).model.vocab_size
        with subprocess.Popen([self.python, PEER, "logits", path, ids], stdout=subprocess.PIPE) as peer:
            for window in windows:
                raw = peer.stdout.read(4 * len(window.target) * vocab)
                scores.append(score(window, log_softmax(np.frombuffer(raw, np.float32).reshape(-1, vocab))))
        return summary(np.concatenate(scores, axis=1), float(np.mean([window.noise for window in windows])))


def _divergence(path: Path, windows: list[Window]) -> Figures:
    with load(path) as model:
        return {key: float(value) for key, value in divergence(model, windows).items()}


if __name__ == "__main__":
    main()
