"""The command line: the command group, its errors and exit codes. The verbs are in `rkf.commands`, on the library.

Exit codes: 0 done, 1 another error, 2 usage, 3 corrupt, 4 unsupported, 5 not an rkf file, 130 Ctrl-C or SIGTERM.
Requested output goes to stdout, everything else to stderr. A verb imports heavy modules only when it runs.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Any

import click

from rkf._version import __version__
from rkf.commands import signals
from rkf.commands.chat_command import chat
from rkf.commands.convert import calibrate, convert, export, pull, push, restore
from rkf.commands.file_commands import diff, footprint, info, join, pack, split, unpack, verify
from rkf.commands.measure import bench, evaluate
from rkf.commands.output import drop_unwritten, open_streams
from rkf.commands.run_command import run
from rkf.commands.serve_command import serve_command
from rkf.commands.study_command import study
from rkf.commands.tune_command import tune
from rkf.commands.warmup import warmup
from rkf.errors import RkfError
from rkf.text.terminal import printable

INTERRUPTED = 130


class Verbs(click.Group):
    """A group that turns the library's errors into messages and exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                signals.refuse_lost()
        except RkfError as error:
            message, code = str(error), error.exit_code
        except KeyboardInterrupt:
            message, code = "", INTERRUPTED
        except MemoryError:
            message, code = "not enough memory: close other programs, or use a smaller model, batch or context", 1
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
            message, code = "the system allows no more threads: close other programs", 1
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone: click ends quietly
                raise
            # Files that are written name themselves, so a full disk without a name is that of stdout.
            place = error.filename or (
                "stdout" if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EBADF, errno.EIO) else ""
            )
            message, code = f"{place}: {error.strerror}" if place else error.strerror or str(error), 1
        drop_unwritten()
        with suppress(OSError):  # stderr may be gone too
            click.echo(f"rkf: {printable(message)}" if message else "", err=True)
        ctx.exit(code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order in which users need them, not alphabetical


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="rkf")
def cli() -> None:
    """Language models as ranks plus values: convert, run and inspect them."""


for verb in (
    run,
    chat,
    serve_command,
    pull,
    push,
    calibrate,
    convert,
    info,
    footprint,
    verify,
    diff,
    pack,
    unpack,
    split,
    join,
    evaluate,
    bench,
    warmup,
    tune,
    study,
    export,
    restore,
):
    cli.add_command(verb)


def main() -> None:
    """The entry point of the command `rkf`."""
    signals.install()
    open_streams()
    cli(prog_name="rkf")
