"""docs/cli.md: the help text of every command. `python -m tests.cli.help_pages` rewrites it."""

from collections.abc import Iterator
from pathlib import Path

import click

from rkf.cli import cli

PATH = Path(__file__).parents[2] / "docs" / "cli.md"
HEAD = """# Commands

Exit codes: 0 done, 1 another error, 2 usage, 3 corrupt, 4 unsupported, 5 not an rkf file, 130 Ctrl-C. Requested output
goes to stdout, everything else to stderr. `RKF_CACHE` names the folder for fetched and converted models, calibrations
and compiled kernels; it may be deleted at any time. `RKF_CPU` (avx512, avxvnni, avx2, neon or portable) selects a
family of kernels; all give the same bits.
"""


def page() -> str:
    """The text of docs/cli.md."""
    top = click.Context(cli, info_name="rkf", terminal_width=100, **cli.context_settings)
    return HEAD + "".join(f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in help_texts(top))


def help_texts(context: click.Context) -> Iterator[tuple[str, str]]:
    """Each command's full name and help, groups before their members."""
    yield context.command_path, context.get_help()
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            yield from help_texts(click.Context(context.command.commands[name], info_name=name, parent=context))


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
