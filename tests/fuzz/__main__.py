"""Fuzzes one target: `python -m tests.fuzz TARGET --minutes N`, or all of them in turn: `make fuzz MINUTES=N`.

The minutes are of CPU time, since other jobs may stop this one.
With atheris (the extra `fuzz`) the bytes are chosen for the branches that they reach, otherwise by chance. Bytes that
break a target are kept in `tests/fuzz/corpus/TARGET/`, where `make test` repeats them.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"rkf": ROOT / "rkf", "rkf.runtime": ROOT / "runtime", "rkf.converters": ROOT / "converters"}


def compiled() -> list[str]:
    """The modules whose functions Numba compiles; it refuses instrumented bytecode."""
    return [
        ".".join([package, *path.relative_to(folder).with_suffix("").parts])
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
        if "numba" in path.read_text(encoding="utf-8")
    ]


try:
    import atheris
except ImportError:
    atheris = None
    from tests.fuzz.targets import TARGETS, Target
else:
    instrumented = partial(atheris.instrument_imports, include=["rkf"], exclude=compiled())  # of what is imported in it
    with instrumented():
        from tests.fuzz.targets import TARGETS, Target

CORPUS = Path(__file__).with_name("corpus")
LENGTH = 64  # bytes that decide one input
LIMIT_S = 20  # of CPU for one input
HANG_S = 900  # of wall time: other jobs may stop this one for minutes


def run_once(target: Target, data: bytes) -> None:
    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="rkf-fuzz-") as folder:
        target(Path(folder), data)
    if (took := time.process_time() - began) > LIMIT_S:
        raise TimeoutError(f"{took:.0f} s of CPU, expected at most {LIMIT_S}")


def mutated(data: bytes, most: int, seed: int) -> bytes:
    """Changed bytes, of full length: each that is missing would choose the first place or value there is."""
    return atheris.Mutate(data + random.Random(seed).randbytes(max(0, LENGTH - len(data))), most)


def steered(name: str, seconds: int) -> None:
    """Atheris ends the process itself at the first failure, with the bytes in a file."""
    count = 0

    def one(data: bytes) -> None:
        nonlocal count
        run_once(TARGETS[name], data)
        count += 1
        if time.process_time() > seconds:
            print(f"{name}: {count} inputs, nothing found", flush=True)
            os._exit(0)

    with instrumented():
        run_once(TARGETS[name], b"")  # imports the readers that are imported where they are first used
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    limits = [f"-timeout={HANG_S}", f"-report_slow_units={HANG_S}", "-rss_limit_mb=4096"]
    inputs = [f"-max_len={LENGTH}", "-len_control=0", "-reduce_inputs=0", f"-artifact_prefix={CORPUS / name}/"]
    atheris.Setup([name, *limits, *inputs], one, custom_mutator=mutated)
    atheris.Fuzz()


def by_chance(name: str, seconds: int) -> None:
    rng, count = random.Random(), 0
    while time.process_time() < seconds:
        data = rng.randbytes(LENGTH)
        try:
            run_once(TARGETS[name], data)
        except BaseException:  # noqa: BLE001  (a panic of a native library is no Exception)
            (CORPUS / name).mkdir(parents=True, exist_ok=True)
            kept = CORPUS / name / f"crash-{data[:8].hex()}"
            kept.write_bytes(data)
            traceback.print_exc()
            sys.exit(f"{kept} breaks {name}")
        count += 1
    print(f"{name}: {count} inputs, nothing found")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=["all", *TARGETS])
    parser.add_argument("--minutes", type=float, default=1)
    given = parser.parse_args()
    if given.target != "all":
        (steered if atheris else by_chance)(given.target, round(given.minutes * 60))
        return
    command, time_each = [sys.executable, "-m", "tests.fuzz"], ["--minutes", str(given.minutes)]
    failed = [name for name in TARGETS if subprocess.run([*command, name, *time_each], check=False).returncode]
    sys.exit(f"found something: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
