"""Every error that a user of rkf can meet: one class per cause, with its exit code. Knows no format and does no I/O.

A message is one line: the file, then the section or tensor, what was expected, what was found, what to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Characters of a message; of a longer one, which quotes a file, the middle is left out.
MOST_MESSAGE = 2000
_END = 500


class RkfError(Exception):
    """The base of all errors that rkf raises on purpose; the command line prints it as one line."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        if len(message) > MOST_MESSAGE:
            message = f"{message[: MOST_MESSAGE - _END - 3]} … {message[-_END:]}"
        super().__init__(message)


class NotRkfError(RkfError):
    """The file is of another kind (GGUF, safetensors, an LFS pointer, …), is empty, or was never committed."""

    exit_code = 5


class UnsupportedError(RkfError):
    """The file needs something that this version lacks: a newer major version, a required feature, an architecture."""

    exit_code = 4


class CorruptError(RkfError):
    """The file is damaged, or was made by a broken writer."""

    exit_code = 3


class StructureError(CorruptError):
    """Found at open: a fault in superblock, directory, extents or shapes."""


class IntegrityError(CorruptError):
    """Found at load: a hash that does not match, padding that is not zero."""


class SemanticsError(CorruptError):
    """Found by `rkf verify`: an index >= K, unused bits that are set, a decoded weight that is not finite."""


class UsageError(RkfError):
    """The caller asked for something impossible: an unknown name, a value out of range, an output that exists."""

    exit_code = 2


class ContextLengthError(UsageError):
    """A prompt has more tokens than the model's context."""


class BindingError(UsageError):
    """A values file belongs to other ranks, to other dense tensors, or to another set of tensors."""


class SourceError(RkfError):
    """A checkpoint cannot be converted: missing shard, unknown tensor type, NaN weights, already quantised."""


class OutputError(RkfError):
    """The output cannot be written: it is the input, or the disk is full."""


class BusyError(OutputError):
    """Another process is writing the output."""


class ChangedError(RkfError):
    """A file changed while it was read, became shorter, or could not be read to its end."""


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Put the name of a file, or of a part of one, before the message of any RkfError that does not begin with it."""
    try:
        yield
    except RkfError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise type(error)(f"{path}: {error}") from None
