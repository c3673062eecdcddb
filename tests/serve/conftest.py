"""Two tiny models behind one server for all tests that do not need their own."""

import pytest

import rkf
from tests.runtime import tiny
from tests.serve.running import running

TOOLS = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool.function.name }}{% endfor %}<tool_call></tool_call><|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls %}{{ call.function.arguments.city }}{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant
{% if enable_thinking %}<think>
</think>{% endif %}"""


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    """Name -> file: "tiny", and "tools" with a template that knows tools and thinking."""
    folder, config = tmp_path_factory.mktemp("served"), tiny.config(context_length=1024)
    found = {"tiny": tiny.write(folder / "tiny.rkf", config, tiny.weights(config))}
    found["tools"] = tiny.write(folder / "tools.rkf", config, tiny.weights(config, seed=1), template=TOOLS)
    return found


@pytest.fixture(scope="session")
def port(paths):
    with running(paths) as number:
        yield number


@pytest.fixture(scope="session")
def model(paths):
    """The model "tiny" in this process."""
    with rkf.load(paths["tiny"], threads=1) as ready:
        yield ready
