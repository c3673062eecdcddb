"""docs/cli.md equals the help texts of the program."""

from tests.cli.help_pages import PATH, page


def test_the_documented_help_is_the_programs():
    assert PATH.read_text(encoding="utf-8") == page(), "run python -m tests.cli.help_pages"
