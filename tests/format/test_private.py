"""What rkf keeps for itself beside an output or in the cache: read only where nobody else can have written it."""

import os

import pytest

from rkf.errors import OutputError
from rkf.file import kept_json
from rkf.file.private import private_folder, read_private

JOB = {"source": "a", "shape": [1, 2], "losses": {"w": 0.5}}


def mode(path):
    return path.stat().st_mode & 0o777


def test_a_folder_is_closed_to_others(tmp_path):
    private_folder(tmp_path / "new" / "folder")
    (tmp_path / "old").mkdir(mode=0o755)
    private_folder(tmp_path / "old")
    assert mode(tmp_path / "new" / "folder") == mode(tmp_path / "old") == 0o700


def test_a_folder_that_others_can_change_is_refused(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "precious").touch()
    (tmp_path / "link").symlink_to("theirs")
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o770)
    for name in ("link", "file", "open"):
        with pytest.raises(OutputError, match=rf"^{tmp_path}/{name}: [^\n]*move it away$"):
            private_folder(tmp_path / name)
    assert (tmp_path / "theirs" / "precious").exists() and mode(tmp_path / "open") == 0o770


def test_only_plain_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    assert read_private(tmp_path / "file", 4) == b"kept"
    for name in ("link", "pipe", "folder", "absent"):
        assert read_private(tmp_path / name, 4) is None
    assert read_private(tmp_path / "file", 3) is None


def test_kept_json_is_what_was_written():
    data = kept_json.sealed("job 1", JOB)
    assert kept_json.opened("job 1", data) == JOB
    assert kept_json.opened("job 1", data.replace(b", ", b",\n ")) == JOB


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"5", b"null", b"[1]", b"{}", b"\xff", b"[" * 100_000, b'{"kept": 5}', b'{"kept": [null, null]}'),
        kept_json.sealed("job 2", JOB),
        kept_json.sealed("job 1", JOB).replace(b"0.5", b"0.25"),
        kept_json.sealed("job 1", JOB).replace(b'"source"', b'"sources"'),
    ],
)
def test_anything_else_is_one_error(data):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        kept_json.opened("job 1", data)
