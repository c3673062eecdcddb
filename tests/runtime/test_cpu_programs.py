"""Programs with every op, on the CPU: the same bits alone, in a mix of rows and token by token; windows and states."""

import json

import numpy as np
import pytest

import rkf
from rkf.errors import UsageError
from rkf.runtime.backend import Row
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.generate import Session
from rkf.runtime.kv_cache import Group, _Table
from tests.spec.document import VECTORS

ENTRIES = json.loads((VECTORS / "manifest.json").read_text())["logits"]
EVERY = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["logits"].removesuffix(".logits.json"))


@EVERY
@pytest.mark.parametrize("exact", [True, False])
def test_a_sequence_has_the_same_bits_alone_in_a_mix_and_token_by_token(entry, exact):
    text = json.loads((VECTORS / entry["logits"]).read_text())
    ids = np.array(text["tokens"])
    positions = text.get("positions", len(ids))
    with rkf.open(VECTORS / entry["file"]) as container:
        backend = CpuBackend(container, exact=exact, threads=2)
        alone = backend.forward([Row(backend.new_sequence(positions), ids)], "all")
        one = backend.new_sequence(positions)
        singly = [backend.forward([Row(one, ids[n : n + 1])]) for n in range(len(ids))]
        assert np.array_equal(np.concatenate(singly), alone)
        rows = [Row(backend.new_sequence(positions), part) for part in (ids[:5], ids, ids[:1])]
        mixed = backend.forward(rows, "all")
        assert np.array_equal(mixed, np.concatenate([alone[:5], alone, alone[:1]]))
        assert np.array_equal(backend.forward([Row(rows[0].sequence.fork(), ids[5:])], "all"), alone[5:])
        assert np.array_equal(backend.forward([Row(rows[0].sequence, ids[5:])], "all"), alone[5:])


def recurrent():
    return next(VECTORS / entry["file"] for entry in ENTRIES if "recurrent" in entry["file"])


def test_a_state_can_be_kept_whole_or_forgotten():
    ids = np.array([1, 7, 3, 14, 15, 9])
    with rkf.open(recurrent()) as container:
        backend = CpuBackend(container)
        sequence = backend.new_sequence(32)
        first = backend.forward([Row(sequence, ids)], "all")
        assert (sequence.reusable(6), sequence.reusable(5), sequence.reusable(99)) == (6, 0, 6)
        with pytest.raises(UsageError):
            sequence.truncate(5)
        sequence.truncate(0)
        assert np.array_equal(backend.forward([Row(sequence, ids)], "all"), first)


def test_a_session_begins_anew_where_a_state_cannot_go_back():
    with rkf.open(recurrent()) as container:
        backend = CpuBackend(container)
        session = Session(backend)
        for ids in ([1, 7, 3], [1, 7, 3, 14], [1, 7, 5], [1]):
            wanted = backend.forward([Row(backend.new_sequence(8), np.array(ids))])[0]
            assert np.array_equal(session.next_logits(ids), wanted)


def test_an_interrupted_call_loses_states(monkeypatch):
    with rkf.open(recurrent()) as container:
        backend = CpuBackend(container)
        sequence, ids = backend.new_sequence(32), np.array([1, 7, 3])
        wanted = backend.forward([Row(sequence, ids)])
        run = backend._pool.run

        def interrupted():
            run()
            raise KeyboardInterrupt

        monkeypatch.setattr(backend._pool, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.forward([Row(sequence, ids)])
        monkeypatch.undo()
        with pytest.raises(UsageError, match="interrupted"):
            backend.forward([Row(sequence, ids)])
        assert sequence.reusable(3) == 0
        sequence.truncate(0)
        assert np.array_equal(backend.forward([Row(sequence, ids)]), wanted)


def test_pages_behind_a_window_are_given_back():
    table = _Table(Group(300, 64), 4096)
    for length in range(0, 2048, 128):
        table.give_back(length)
        table.reserve(length, length + 128)
    held = np.flatnonzero(table.addresses)
    assert held.tolist() == [6, 7]  # of 256 positions each: 300 behind 1920, and the 128 that came
    assert table.can_go_back_to(2000) and not table.can_go_back_to(1800)
    table.truncate(0)
    assert not table.addresses.any() and table.can_go_back_to(0)
