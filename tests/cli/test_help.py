"""docs/cli.md is what the program says."""

from tests.cli.help_pages import PATH, page


def test_the_documented_help_is_the_programs():
    assert PATH.read_text(encoding="utf-8") == page(), "python -m tests.cli.help_pages writes it anew"
