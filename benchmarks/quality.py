"""KL divergence, perplexity and agreement against file size, for rkf, types of llama.cpp and NF4 from one source.

    python -m benchmarks.degrid SRC.gguf SOURCE
    python -m benchmarks.quality SOURCE WORK --tools BIN --text wiki.txt=64 --text code.txt=24 --out quality.json

SOURCE: a Hugging Face folder. The texts are held out: calibration never sees them. WORK: a folder for models and
results; existing ones are reused, so an interrupted run resumes. BIN: the folder of llama-quantize, llama-imatrix and
llama-perplexity, of llama.cpp or ik_llama.cpp. llama-perplexity judges all models against the source in f16; ours are
exported as GGUF with f16 weights. The peers' importance matrix and our calibration come from the same text: TEXT of
`--calibration`, by default one that the source generates.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import nf4
from benchmarks.report import ratios, table
from rkf.calibrate.calibration import CTX, Calibrate
from rkf.calibrate.kept import save
from rkf.cluster.allocation import coarse
from rkf.commands.quantities import byte_count
from rkf.converters.export import export_gguf
from rkf.converters.pipeline import convert
from rkf.converters.rotated_source import RotatedSource
from rkf.converters.source import open_source
from rkf.file.atomic import replacing
from rkf.text.tokenizer import Tokenizer

TYPES = ("IQ3_K", "Q3_K_M", "IQ4_KS", "IQ4_XS", "Q4_0", "Q4_K_M", "IQ5_K", "Q5_K_M", "Q6_K")
SIZES = ("70MB", "80MB", "91MB", "105MB", "112MB", "138MB")
# What llama-perplexity prints, by the names of our results. Shares are printed in percent.
_PRINTED = {
    "ppl": r"Mean PPL\(Q\) +: +([\d.]+)",
    "ppl_reference": r"Mean PPL\(base\) +: +([\d.]+)",
    "ppl_ratio": r"Mean PPL\(Q\)/PPL\(base\) +: +([\d.]+)",
    "ppl_ratio_stderr": r"Mean PPL\(Q\)/PPL\(base\) +: +[\d.]+ ± +([\d.]+)",
    "kld": r"Mean +KLD: +(-?[\d.]+)",
    "kld_stderr": r"Mean +KLD: +-?[\d.]+ ± +([\d.]+)",
    "kld_median": r"Median +KLD: +(-?[\d.]+)",
    "kld_p99": r"99\.0% +KLD: +(-?[\d.]+)",
    "kld_max": r"Maximum KLD: +(-?[\d.]+)",
    "top1": r"Same top p: +([\d.]+)",
    "top1_stderr": r"Same top p: +[\d.]+ ± +([\d.]+)",
}


@dataclass(frozen=True, slots=True)
class Contestant:
    """One model. make: writes what does not exist yet; returns the bytes that it counts for, and the GGUF to judge."""

    name: str
    make: Callable[[], tuple[int, Path]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tools", type=Path, required=True, metavar="BIN")
    parser.add_argument("--text", action="append", required=True, metavar="FILE=WINDOWS")
    parser.add_argument("--calibration", type=Path, metavar="TEXT")
    parser.add_argument("--sizes", nargs="*", default=SIZES)
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = Bench(options.source, options.work, options.tools, options.calibration)
    contestants = [*bench.ours(options.sizes), *bench.peers(options.types), bench.nf4()]
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

    def __init__(self, source: Path, work: Path, tools: Path, calibration: Path | None) -> None:
        self.source, self.work, self.tools, self.text = source, work, tools, calibration
        work.mkdir(exist_ok=True)
        label, fingerprint = work / "source", open_source(source).fingerprint
        if label.exists() and label.read_text(encoding="utf-8") != fingerprint:
            raise SystemExit(f"{work}: holds results of another source: choose another folder")
        label.write_text(fingerprint, encoding="utf-8")

    def row(self, contestant: Contestant, text: Path, windows: int) -> dict[str, Any]:
        """A line of the table, cached as `MODEL@TEXT-WINDOWS.json`."""
        kept = self.work / f"{contestant.name}@{text.stem}-{windows}.json"
        if not kept.exists():
            size, model = contestant.make()
            row = {"name": contestant.name, "bytes": size, **self._judged(model, text, windows)}
            with replacing(kept) as output:
                output.write(json.dumps(row).encode())
            print(f"{contestant.name}: KLD {row['kld']:.5f}", flush=True)
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found

    def ours(self, sizes: Sequence[str]) -> Iterator[Contestant]:
        for size in sizes:
            path = self.work / f"rkf-{size}.rkf"

            def make(path: Path = path, size: str = size) -> tuple[int, Path]:
                if not path.exists():
                    convert(self.source, path, size=byte_count(size), calibrate=Calibrate(self._calibration()))
                return path.stat().st_size, self._exported(path)

            yield Contestant(f"rkf-{size}", make)

    def peers(self, types: Sequence[str]) -> Iterator[Contestant]:
        for kind in types:
            path = self.work / f"{kind}.gguf"

            def make(path: Path = path, kind: str = kind) -> tuple[int, Path]:
                if not path.exists():
                    made = path.with_suffix(".partial")
                    self._run("llama-quantize", "--imatrix", self._importance(), self._f16(), made, kind)
                    made.replace(path)
                return path.stat().st_size, path

            yield Contestant(kind, make)

    def nf4(self) -> Contestant:
        path = self.work / "nf4.rkf"

        def make() -> tuple[int, Path]:
            return nf4.write(open_source(self.source), path), self._exported(path)

        return Contestant("NF4", make)

    def _judged(self, model: Path, text: Path, windows: int) -> dict[str, float]:
        """The figures of llama-perplexity: it scores the second half of every window of 512 tokens."""
        base = self.work / f"{text.stem}-{windows}.logits"
        read = ("-f", text, "--chunks", windows, "-c", 512)
        if not base.exists():
            made = base.with_suffix(".partial")
            self._run("llama-perplexity", "-m", self._f16(), *read, "--kl-divergence-base", made)
            made.replace(base)
        printed = self._run("llama-perplexity", "-m", model, "--kl-divergence", "--kl-divergence-base", base)
        found = {key: float(re.findall(pattern, printed)[0]) for key, pattern in _PRINTED.items()}
        return {**found, "top1": found["top1"] / 100, "top1_stderr": found["top1_stderr"] / 100}

    def _run(self, tool: str, *arguments: object) -> str:
        """What one of llama.cpp's tools prints."""
        command = [self.tools / tool, *map(str, arguments)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def _exported(self, path: Path) -> Path:
        """An rkf file with f16 weights, for the judge. One file holds them in turn."""
        out = self.work / "judged.gguf"
        export_gguf(path, out, force=True)
        return out

    def _dense(self) -> Path:
        path = self.work / "dense.rkf"
        if not path.exists():
            convert(self.source, path, recipe="dense")
        return path

    def _f16(self) -> Path:
        path = self.work / "f16.gguf"
        if not path.exists():
            export_gguf(self._dense(), path)
        return path

    def _calibration(self) -> Path:
        path = self.work / "calibration.npz"
        if not path.exists():
            source = open_source(self.source)
            made = Calibrate(self.text)(source)
            save(path, made.kept(made.of(RotatedSource(source)).losses(coarse)))
        return path

    def _importance(self) -> Path:
        """llama.cpp's importance matrix, from the tokens of our calibration."""
        path = self.work / "importance.dat"
        if not path.exists():
            source = open_source(self.source)
            tokens = Calibrate(self._calibration())(source).tokens
            text = Tokenizer(source.tokenizer_json, source.model).decode(tokens.reshape(-1).tolist(), special=True)
            (self.work / "calibration.txt").write_text(text, encoding="utf-8")
            made = path.with_suffix(".partial")
            self._run("llama-imatrix", "-m", self._f16(), "-f", self.work / "calibration.txt", "-c", CTX, "-o", made)
            made.replace(path)
        return path


if __name__ == "__main__":
    main()
