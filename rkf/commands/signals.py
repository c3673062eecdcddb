"""What signals do to a command. SIGTERM and SIGHUP end it as Ctrl-C does, SIGBUS with a line.

SIGBUS says that a page of a mapped file is gone. Its handler runs in the thread that wanted the page, in the middle of
an access, so it can neither raise nor return before the page is there. It maps zeros in its place, and a timer raises
ChangedError in the main thread a moment later, before anything made of zeros can be committed.
"""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType
from typing import Any

from rkf.errors import ChangedError

_DELAY_S = 0.01
_MOST = 64  # faults of one process: every thread may have one; more than that are not of files that rkf has mapped

_faults = 0
_kept: list[Any] = []  # the handler as C sees it


def install() -> None:
    """Handle the signals of this process. Only the command line calls it: a library leaves them as they are."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left half-written
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not so under nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    if hasattr(signal, "SIGBUS"):
        signal.signal(signal.SIGALRM, _raise_lost)
        _kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(_on_fault))
        # Python's own signal handlers only set a flag and return to the access, which would fault for ever.
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal(signal.SIGBUS, _kept[0])


def refuse_lost() -> None:
    """Raise ChangedError if a file has vanished, instead of whatever its zeros led to. It is not raised again later."""
    from rkf.file.mapped import refuse_lost as refuse

    if _faults:
        signal.setitimer(signal.ITIMER_REAL, 0)
        refuse()


def _on_fault(number: int) -> None:
    global _faults
    from rkf.file.mapped import replace_lost

    _faults += 1
    try:
        if _faults < _MOST and replace_lost():
            signal.setitimer(signal.ITIMER_REAL, _DELAY_S, _DELAY_S)
            return
    except OSError:
        pass
    os.write(2, b"rkf: a file that was open became shorter, or its disk failed: restore it and start again\n")
    os._exit(ChangedError.exit_code)


def _raise_lost(number: int, frame: FrameType | None) -> None:
    while frame is not None:  # an exception would be lost in the handler: the next tick will find it gone
        if frame.f_code is _on_fault.__code__:
            return
        frame = frame.f_back
    refuse_lost()
