"""docs/cli.md: the help text of every command. `python -m tests.cli.help_pages` writes it anew."""

from collections.abc import Iterator
from pathlib import Path

import click

from rkf.cli import cli

PATH = Path(__file__).parents[2] / "docs" / "cli.md"
HEAD = """# Commands

Exit codes: 0 done, 1 another error, 2 usage, 3 corrupt, 4 unsupported, 5 not an rkf file, 130 Ctrl-C. What was asked
for goes to stdout, everything else to stderr. `RKF_CACHE` names the folder for fetched and converted models and for
compiled kernels.
"""


def page() -> str:
    """All of docs/cli.md."""
    return HEAD + "".join(f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in help_texts(cli, "rkf"))


def help_texts(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
    """Each command's full name and help, groups before their members."""
    yield name, command.get_help(click.Context(command, info_name=name, terminal_width=100))
    if isinstance(command, click.Group):
        for member in command.list_commands(click.Context(command)):
            yield from help_texts(command.commands[member], f"{name} {member}")


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
