"""The interpreter on the program vectors of the specification, which use every op."""

import json
from pathlib import Path

import numpy as np
import pytest

import rkf
from tests.calibrate.test_interpreter import Unrounded, run

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"
NAMES = [path.name.removesuffix(".logits.json") for path in sorted(VECTORS.glob("program-*.logits.json"))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [None, 5], ids=["at once", "in chunks"])
def test_logits_are_those_stated(name, step):
    stated = json.loads((VECTORS / f"{name}.logits.json").read_text())
    ids, expected = np.array([stated["tokens"]]), np.array(stated["logits"])
    with rkf.open(VECTORS / f"{name.removesuffix('.long')}.rkf") as file:
        program = file.model.program
        weights = {weight.name: file.decode(weight.name) for weight in program.weights()}
    positions, cache = stated.get("positions", 64), Unrounded() if step else None
    starts = range(0, ids.size, step or ids.size)
    chunks = [ids[:, start : start + (step or ids.size)] for start in starts]
    found = np.concatenate([run(program, weights, chunk, cache, positions=positions) for chunk in chunks], axis=1)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
