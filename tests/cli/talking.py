"""`rkf` as a user types it: its output, or a pseudo-terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
from functools import partial


def cut(tokens):
    """What stderr says of an answer without an end."""
    return f"(cut at {tokens} tokens; --max-tokens allows more)\n"


def command(*arguments):
    return [sys.executable, "-m", "rkf", *map(str, arguments)]


def run(*arguments, **options):
    return subprocess.run(command(*arguments), capture_output=True, encoding="utf-8", check=False, **options)


class Terminal:
    """`rkf` on a pseudo-terminal, with Ctrl-C and Ctrl-D sent as by a keyboard."""

    def __init__(self, *arguments):
        self.screen = ""
        self._terminal, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command(*arguments),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=os.environ | {"PROMPT_TOOLKIT_NO_CPR": "1"},  # nobody answers where the cursor is
            # The test runner may itself ignore Ctrl-C (as a background job does), and children inherit that.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)

    def type(self, text):
        os.write(self._terminal, text.encode())

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def wait_for(self, pattern):
        """The output up to a pattern, since the last call."""
        while not (found := re.search(pattern, self.screen)):
            piece = self._read()
            assert piece, f"ended without {pattern!r}: {self.screen!r}"
            self.screen += piece
        text, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return text

    def finish(self):
        """The exit code, after the process has ended by itself."""
        while piece := self._read():
            self.screen += piece
        return self.process.wait(timeout=30)

    def _read(self):
        ready, _, _ = select.select([self._terminal], [], [], 30)
        assert ready, f"silent for 30 s after {self.screen!r}"
        try:
            return os.read(self._terminal, 1 << 16).decode(errors="replace")
        except OSError:  # Linux reports a closed other end like this
            return ""
