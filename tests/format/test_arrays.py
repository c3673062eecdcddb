"""Kept arrays from bytes that nobody vouches for: exactly what is expected, or one ValueError, at the bytes' cost."""

import io
import zipfile

import numpy as np
import pytest

from rkf.file.arrays import packed_arrays, read_arrays

EXPECTED = {"ids": ("u4", 2), "names": ("U", 1)}
SOUND = {"ids": np.arange(6, dtype=np.uint32).reshape(2, 3), "names": np.array(["a", "bc"])}
KIND = "sample 1"


def packed(arrays, kind=KIND):
    return bytes(packed_arrays(kind, arrays))


def resealed(save=np.savez, **changes):
    """The sound file with other arrays and the old hash."""
    data = io.BytesIO()
    save(data, **{**np.load(io.BytesIO(packed(SOUND))), **changes})
    return data.getvalue()


def zipped(members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


LABEL = {"kept.npy": zipfile.ZipFile(io.BytesIO(packed(SOUND))).read("kept.npy")}
HUGE = header("{'descr': '<u4', 'fortran_order': False, 'shape': (1048576, 1048576), }")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_was_saved_comes_back(save):
    found = read_arrays(resealed(save), KIND, EXPECTED)
    assert found.keys() == SOUND.keys()
    assert all(np.array_equal(found[name], SOUND[name]) for name in SOUND)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK nonsense",
        packed(SOUND)[:-30],
        packed(SOUND, "sample 2"),
        packed({"ids": SOUND["ids"]}),
        packed(SOUND | {"more": np.zeros(1)}),
        packed(SOUND | {"ids": SOUND["ids"].astype(np.int64)}),
        packed(SOUND | {"ids": SOUND["ids"].astype(np.float32)}),
        packed(SOUND | {"ids": SOUND["ids"].ravel()}),
        packed(SOUND | {"names": np.zeros(2)}),
        resealed(ids=SOUND["ids"] + 1),
        resealed(names=np.array([None, 3], object)),
        resealed(kept=np.array([KIND])),
        zipped({"ids.npy": packed(SOUND), "names.npy": b""}),
        zipped({**LABEL, "ids.npy": HUGE, "names.npy": b""}),
        zipped({**LABEL, "ids.npy": header("nonsense"), "names.npy": b""}),
        zipped({**LABEL, "ids.npy": bytes((1 << 29) + 1), "names.npy": b""}),
    ],
    ids=range(17),
)  # fmt: skip
def test_anything_else_is_one_error(data):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_arrays(data, KIND, EXPECTED)
