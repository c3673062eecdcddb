"""Programs with every op, on the CPU: the same bits alone, in a mix of rows and token by token; windows and states."""

import json

import numpy as np
import pytest

import rkf
from rkf.errors import UsageError
from rkf.runtime import beginnings, engine
from rkf.runtime.backend import Row
from rkf.runtime.cpu import CpuBackend
from rkf.runtime.engine import Engine
from rkf.runtime.held_bytes import HeldBytes
from rkf.runtime.kv_cache import Group, PageTable
from rkf.runtime.snapshots import MOST, SPACING, Snapshots
from tests.runtime.asking import next_logits
from tests.spec.document import VECTORS

ENTRIES = json.loads((VECTORS / "manifest.json").read_text())["logits"]
EVERY = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["logits"].removesuffix(".logits.json"))


@EVERY
@pytest.mark.parametrize("exact", [True, False])
def test_a_sequence_has_the_same_bits_alone_in_a_mix_and_token_by_token(entry, exact):
    ids = np.array(json.loads((VECTORS / entry["logits"]).read_text())["tokens"])
    positions = len(ids)
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


def test_a_state_goes_back_to_its_marks_alone():
    ids = np.array([1, 7, 3, 14, 15, 9])
    with rkf.open(recurrent()) as container:
        backend = CpuBackend(container)
        sequence = backend.new_sequence(32)
        first = [backend.forward([Row(sequence, ids[:3])], "all")]
        sequence.mark()
        first.append(backend.forward([Row(sequence, ids[3:])], "all"))
        for each in (sequence, sequence.fork()):
            assert [each.reusable(n) for n in (99, 6, 5, 3, 2)] == [6, 6, 3, 3, 0]
            with pytest.raises(UsageError):
                each.truncate(5)
            for _ in range(2):
                each.truncate(3)
                assert np.array_equal(backend.forward([Row(each, ids[3:])], "all"), first[1])
        sequence.truncate(0)
        assert sequence.reusable(3) == 0
        assert np.array_equal(backend.forward([Row(sequence, ids)], "all"), np.concatenate(first))


def test_an_engine_computes_what_no_mark_holds(monkeypatch):
    """Texts that share a beginning, of a model with states; each gets the logits of a sequence of its own."""
    monkeypatch.setattr(engine, "_OPENING", 2)
    for module in (engine, beginnings):
        monkeypatch.setattr(module, "WORTHWHILE", 4)
    shared, computed = [*range(3, 13)], []
    texts = [[*shared, 1, 2, 1, 2, 1, 2], [*shared, 5, 6, 5, 6, 5, 6], [*shared, 5, 6, 5, 6, 9], [*shared, 8, 8], [7]]
    with rkf.open(recurrent()) as container:
        backend = CpuBackend(container)
        wanted = [backend.forward([Row(backend.new_sequence(32), np.array(ids))])[0] for ids in texts]
        together, forward = Engine(backend), backend.forward
        monkeypatch.setattr(
            backend, "forward", lambda rows, *rest: computed.append(len(rows[0].tokens)) or forward(rows, *rest)
        )
        for ids, logits in zip(texts, wanted, strict=True):
            assert np.array_equal(next_logits(together, ids), logits)
            computed.append("|")
    # 14: a prompt but its last two; then the beginning that it shares with the last one; those are marks from then on
    assert computed == [14, 2, "|", 10, 4, 2, "|", 1, "|", 2, "|", 1, "|"]


def test_an_interrupted_call_loses_states(monkeypatch):
    with rkf.open(recurrent()) as container:
        backend = CpuBackend(container)
        sequence, ids = backend.new_sequence(32), np.array([1, 7, 3])
        wanted = backend.forward([Row(sequence, ids)])
        sequence.mark()
        again = backend.forward([Row(sequence, ids)])
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
        assert sequence.reusable(6) == 3
        sequence.truncate(3)
        assert np.array_equal(backend.forward([Row(sequence, ids)]), again)
        sequence.truncate(0)
        assert np.array_equal(backend.forward([Row(sequence, ids)]), wanted)


def test_copies_of_states_are_few_and_well_spread():
    copies = Snapshots()
    for length in range(1, 32769):
        if length in (300, 9000, 30000):
            copies.keep(length, lambda: None, marked=True)
        elif copies.due(length):
            copies.keep(length, lambda: None)
    held = [length for length in range(32769) if copies.longest(length) == length][1:]
    assert len(held) == MOST
    assert {9000, 30000, max(held)} <= set(held) and max(held) > 32768 - SPACING
    assert all(copies.longest(tokens) > 0.3 * tokens for tokens in range(300, 32769))
    copies.cut(9100)
    assert copies.longest(32768) == 9000


def test_pages_behind_a_window_are_given_back():
    table = PageTable(Group(300, 64), 4096, HeldBytes())
    for length in range(0, 2048, 128):
        if length == 1024:
            table.mark(length)
        table.give_back(length)
        table.reserve(length, length + 128)
    # 300 behind 1920 and the 128 that came, of 256 positions a page, and 300 behind the mark
    assert np.flatnonzero(table.addresses).tolist() == [2, 3, 6, 7]
    assert [table.can_go_back_to(length) for length in (2000, 1800, 1024, 1023, 800)] == [
        True,
        False,
        True,
        True,
        False,
    ]
    table.mark(2048)
    table.give_back(2048)
    assert np.flatnonzero(table.addresses).tolist() == [6, 7]
    table.truncate(0)
    assert not table.addresses.any() and table.can_go_back_to(0)


def test_a_text_that_outgrows_its_ropes_is_computed_again():
    path = next(VECTORS / entry["file"] for entry in ENTRIES if ".long." in entry["logits"])
    ids = np.array([1, 7, 3, 14, 15, 9, 2, 6] * 4)
    with rkf.open(path) as container:
        backend = CpuBackend(container)
        short = min(rope.original_context for rope in backend.metadata.program.ropes if rope.long is not None)
        wanted = {n: backend.forward([Row(backend.new_sequence(n), ids[:n])])[0] for n in (9, short, short + 1, 32)}
        together, sequence = Engine(backend), backend.new_sequence(64)
        for n in (short, short + 1, 9, 32):
            assert np.array_equal(next_logits(together, ids[:n].tolist()), wanted[n])
        other = backend.new_sequence(64)
        backend.forward([Row(sequence, ids[:9])])
        found = backend.forward(
            [Row(other, ids[:2]), Row(sequence, ids[9 : short + 1]), Row(backend.new_sequence(9), ids[:9])]
        )
        assert np.array_equal(found[1:], [wanted[short + 1], wanted[9]])
        fork = sequence.fork()
        for each in (sequence, fork):  # the other way round: cut, it goes on shorter
            each.truncate(8)
            assert np.array_equal(backend.forward([Row(each, ids[8:9])])[0], wanted[9])
        assert np.array_equal(backend.forward([Row(fork, ids[9:])])[0], wanted[32])
