"""Every runtime computes what the specification says: the logits of the vectors, within the tolerance of program.md."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import rkf
from rkf.calibrate.interpreter import Flow, Stretch, logits
from rkf.errors import UnsupportedError
from rkf.runtime.backend import Row
from rkf.runtime.torch_model import Decoder
from tests.spec.document import VECTORS

ENTRIES = json.loads((VECTORS / "manifest.json").read_text())["logits"]
EVERY = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["logits"].removesuffix(".logits.json"))
# program.md grants 1e-4. A norm of small sums of the delta rule makes more of rounding: 1.7e-5 in torch and numpy.
TOLERANCE, OF_RECURRENT = 1e-5, 1e-4


def text(entry: dict[str, Any]) -> tuple[list[int], int, NDArray[np.float64]]:
    """Tokens, how long the sequence may grow, and the logits that are due."""
    found = json.loads((VECTORS / entry["logits"]).read_text())
    return found["tokens"], found.get("positions", len(found["tokens"])), np.array(found["logits"])


def check(entry: dict[str, Any], found: NDArray[np.float32], expected: NDArray[np.float64]) -> None:
    assert found.shape == expected.shape
    tolerance = OF_RECURRENT if "recurrent" in entry["file"] else TOLERANCE
    assert abs(found - expected).max() < tolerance * abs(expected).max()


@EVERY
def test_cpu(entry: dict[str, Any]) -> None:
    tokens, positions, expected = text(entry)
    try:
        model = rkf.load(VECTORS / entry["file"], exact=True)
    except UnsupportedError as error:
        assert "recurrent" in entry["file"] and "has no op" in str(error)
        return
    with model:
        sequence = model._backend.new_sequence(positions)
        check(entry, model._backend.forward([Row(sequence, np.array(tokens))], "all"), expected)


@EVERY
def test_numpy_interpreter(entry: dict[str, Any]) -> None:
    tokens, positions, expected = text(entry)
    with rkf.open(VECTORS / entry["file"]) as container:
        assert container.model is not None
        program = container.model.program
        weights = {name: container.decode(name) for name in container.tensors}
    flow = Flow(np.array([tokens]))
    parts = [Stretch.stem(program, positions)]
    parts += [Stretch.of_layer(program, number, positions) for number in range(program.layers)]
    for part in (*parts, Stretch.top(program, positions)):
        flow = part(weights, flow, None, None)
    check(entry, logits(program.logits, flow.values[program.logits.src][0], weights[program.logits.weight]), expected)


@EVERY
@torch.no_grad()
def test_torch_decoder(entry: dict[str, Any]) -> None:
    tokens, positions, expected = text(entry)
    with rkf.open(VECTORS / entry["file"]) as container:
        decoder = Decoder(container)
    cache = decoder.new_cache(1, positions)
    check(entry, decoder.head(decoder(torch.tensor([tokens]), cache))[0].numpy(), expected)
