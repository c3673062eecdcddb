"""Chat templates: equal to transformers', in a sandbox, within limits."""

import subprocess
import sys
from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from rkf.errors import UnsupportedError, UsageError
from rkf.model.metadata import ModelMetadata
from rkf.text import template
from rkf.text.tokenizer import Tokenizer
from tests.format.first_form_metadata import metadata_of
from tests.runtime import tiny

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <b>1 & 2</b> — “quoted” 日本?"},
    {"role": "assistant", "content": "3", "tool_calls": [{"name": "add", "arguments": {"b": 2, "a": [1, None, True]}}]},
    {"role": "user", "content": "And\n\n  then?"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "chatml": tiny.CHAT_TEMPLATE,
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}"
        "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}"
        "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system %}"
        "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "blocks are trimmed": (
        "{% for message in messages %}\n    {% if loop.first %}\n{{ bos_token }}\n    {% endif %}\n"
        "{{ message.content }}\n{% endfor %}\n"
    ),
    "tojson": "{% for message in messages %}{{ message | tojson }}{{ message | tojson(indent=2) }}{% endfor %}",
    "generation tag": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    ),
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace, macro, tools": (
        "{% set ns = namespace(n=0) %}{% macro show(m) %}[{{ m.role|upper }}]{% endmacro %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ show(m) }}{% endfor %}"
        "{{ ns.n }}{{ tools is none }}{{ undefined_name }}"
    ),
}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("prompted", [True, False])
def test_equals_transformers(source, prompted):
    ours = template.render(source, MESSAGES, special_tokens=SPECIAL, add_generation_prompt=prompted)
    theirs, _ = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=prompted, **SPECIAL)
    assert ours == theirs[0]


@pytest.mark.parametrize(
    "names",
    [
        {"reasoning": "r"},
        {"thinking": "r"},
        {"reasoning_content": "r"},
        {"thinking": None, "reasoning_content": "r"},
        {"thinking": "t", "reasoning": "r"},
        {"reasoning": None},
    ],
)
def test_reasoning_has_the_names_that_transformers_gives_it(names):
    source = "{{ messages | tojson }}"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **names}]
    theirs, _ = render_jinja_template([messages], chat_template=source)
    assert template.render(source, messages, special_tokens={}) == theirs[0]


def test_the_date_is_the_one_handed_in():
    text = template.render("{{ strftime_now('%d %b %Y') }}", [], special_tokens={}, now=datetime(2024, 7, 26))
    assert text == "26 Jul 2024"


def test_the_tokenizer_hands_its_special_tokens_over():
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"
    model = ModelMetadata.of_first_form(metadata_of(tiny.config()), tiny.weights(tiny.config()))
    tokenizer = Tokenizer(tiny.byte_level_tokenizer().to_str().encode(), model, source)
    assert tokenizer.render([{"role": "user", "content": "hi"}]) == "<|im_start|>hi<|im_end|>"


def test_a_template_may_refuse_the_messages():
    with pytest.raises(UsageError, match="roles must alternate"):
        template.render(TEMPLATES["llama-2"], [MESSAGES[1]] * 2, special_tokens=SPECIAL)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ ('{0.__class__}').format(1) }}",
    "{{ strftime_now.__self__.__class__.__subclasses__() }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_holds(source):
    try:
        text = template.render(source, MESSAGES, special_tokens={})
    except UnsupportedError:
        return
    assert text == "", "an unsafe attribute is undefined, and undefined prints as nothing"


BOMBS = {
    "string": "{{ 'a' * 10 ** 10 }}",
    "doubling": "{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "padding": "{{ 'a'.ljust(10 ** 10) }}",
    "width": "{{ '%*d' % (10 ** 9 * 8, 1) }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


def test_limits_that_are_lower_already_stay():
    render = "from rkf.text import template; print(template.render('{{ 1 + 1 }}', [], special_tokens={}))"
    command = f'ulimit -t {template.CPU_SECONDS - 1}; exec "{sys.executable}" -c "{render}"'
    assert subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout == "2\n"


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_end_in_a_message(source, monkeypatch):
    monkeypatch.setattr(template, "CPU_SECONDS", 1)
    with pytest.raises(UnsupportedError, match="chat template cannot be rendered"):
        template.render(source, MESSAGES, special_tokens={})


def test_the_clock_ends_what_takes_no_processor_time(monkeypatch):
    monkeypatch.setattr(template, "WALL_SECONDS", 0.5)
    with pytest.raises(UnsupportedError, match=r"not rendered within 0\.5 s"):
        template.render(BOMBS["loops"], MESSAGES, special_tokens={})


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].role.nothing.more }}",
        "{% include 'x' %}",
        "{% for i in '' %}" * 25 + "{% endfor %}" * 25,
    ],
)
def test_a_broken_template_is_one_line(source):
    with pytest.raises(UnsupportedError) as caught:
        template.render(source, MESSAGES, special_tokens={})
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_an_oversized_template_is_refused_unread():
    with pytest.raises(UnsupportedError, match="expected at most"):
        template.render(" " * (template.MAX_TEMPLATE_CHARS + 1), MESSAGES, special_tokens={})


def test_more_templates_than_are_kept_compiled():
    for _ in range(2):
        for number in range(10):
            source = f"{number}: {{{{ messages[{number % 2}].content }}}}"
            assert (
                template.render(source, MESSAGES, special_tokens={}) == f"{number}: {MESSAGES[number % 2]['content']}"
            )
