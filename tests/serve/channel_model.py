"""A tiny model whose template writes channels, as gpt-oss' does."""

from tests.runtime import tiny

TOKENS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>"]
TEMPLATE = """\
{%- for tool in tools or [] %}<|start|>developer<|message|>{{ tool.function.name }}<|end|>{% endfor %}
{%- for message in messages %}
{%- if message.role == "assistant" %}
{%- if message.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{% endif %}
{%- if message.tool_calls %}{% set call = message.tool_calls[0].function %}
{%- set last = call.name %}<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>
{{- call.arguments|tojson }}<|call|>
{%- else %}<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>{% endif %}
{%- elif message.role == "tool" %}<|start|>functions to=assistant<|channel|>commentary<|message|>
{{- message.content }}<|end|>
{%- else %}<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>{% endif %}
{%- endfor %}<|start|>assistant"""


def tokenizer():
    """A byte-level tokenizer with the special tokens of channels."""
    found = tiny.byte_level_tokenizer()
    found.add_special_tokens(TOKENS)
    return found


def write(path):
    """A random model with this tokenizer and template, which `<|return|>` and `<|call|>` end."""
    made = tokenizer()
    size = made.get_vocab_size()
    ends = tuple(made.token_to_id(text) for text in ("<|return|>", "<|call|>"))
    config = tiny.config(vocab_size=size, context_length=1024, eos_ids=ends)
    return tiny.write(path, config, tiny.weights(config, seed=2), tokenizer=made, template=TEMPLATE)
