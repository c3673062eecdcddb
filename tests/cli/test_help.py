"""docs/cli.md equals the help texts of the program; options of answers have the same words everywhere."""

import pytest

from rkf.cli import cli
from rkf.runtime.model import Options
from tests.cli.help_pages import PATH, page


def test_the_documented_help_is_the_programs():
    assert PATH.read_text(encoding="utf-8") == page(), "run python -m tests.cli.help_pages"


@pytest.mark.parametrize("verb", ["run", "chat", "serve"])
def test_answers_have_the_options_of_the_library(verb):
    names = {parameter.name for parameter in cli.commands[verb].params}
    given_by_files = {"form": {"json_schema", "grammar"}, "template_args": {"template_arg"}, "logit_bias": set()}
    for keyword in Options.__annotations__:
        assert given_by_files.get(keyword, {keyword}) <= names
