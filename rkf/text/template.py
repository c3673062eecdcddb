"""A model's chat template: messages -> prompt text, rendered in a separate process. Knows no tokens.

Templates come from files that strangers made. So `template_worker.py` renders each one in Jinja's immutable sandbox
with limits on time, memory and output. The first render costs about 80 ms, nearly all of it for starting the process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rkf.errors import UnsupportedError, UsageError
from rkf.text.template_pool import TemplatePool

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant" | …, "content": str, …}

MAX_TEMPLATE_CHARS = 1 << 20
MAX_PROMPT_CHARS = 16 << 20
MEMORY_BYTES = 1 << 30
CPU_SECONDS = 5
WALL_SECONDS = 60  # generous, because the machine may be busy; the CPU limit is the one that ends a loop

_REASONING = ("reasoning_content", "thinking", "reasoning")  # the first that a message has counts, as in transformers

_POOL = TemplatePool()
_REFUSED = 2


def render(
    template: str,
    messages: Sequence[Message],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> str:
    """The prompt for `messages`, equal to transformers' `apply_chat_template(tokenize=False)`.

    special_tokens: the template's variables such as `bos_token`. tools: functions that the model may call, in OpenAI's
    form. variables: others that the template reads, such as `enable_thinking`. now: the time that `strftime_now` reads
    (default: the clock); give it to repeat a prompt that contains a date. UsageError: the template refuses these
    messages, or they are not JSON. UnsupportedError: it cannot be rendered within the limits.
    """
    if len(template) > MAX_TEMPLATE_CHARS:
        size = f"{len(template)} characters, expected at most {MAX_TEMPLATE_CHARS}"
        raise UnsupportedError(f"chat template: {size}; use --raw to prompt without it")
    request = {
        "variables": {
            "documents": None,
            **special_tokens,
            **(variables or {}),
            "messages": [_with_reasoning(message) for message in messages],
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        },
        "now": (now or datetime.now()).isoformat(),
        "max_chars": MAX_PROMPT_CHARS,
        "memory_bytes": MEMORY_BYTES,
        "cpu_seconds": CPU_SECONDS,
    }
    try:
        encoded = json.dumps(request).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"messages: expected values that JSON has: {error}") from error
    return _run_worker(template.encode("utf-8", "surrogatepass"), encoded)


def _with_reasoning(message: Message) -> Message:
    """A message whose reasoning, under any of its names, has the two that templates read. One that is null stays so."""
    if not isinstance(message, Mapping):
        return message
    given = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if given is None else {"thinking": given, **message, "reasoning_content": given}


def _run_worker(template: bytes, request: bytes) -> str:
    try:
        done = _POOL.run(template, request, WALL_SECONDS)
    except TimeoutError:
        raise UnsupportedError(f"chat template: not rendered within {WALL_SECONDS} s") from None
    if done.code == 0:
        return done.output.decode("utf-8", "surrogatepass")
    message = " ".join(done.output.decode(errors="replace").split())
    if done.code == _REFUSED:
        raise UsageError(f"chat template: {message}")
    if done.code < 0:  # killed by the CPU limit or the system's memory limit
        message = f"rendering took more than {CPU_SECONDS} s of processor time or too much memory"
    raise UnsupportedError(f"chat template cannot be rendered: {message}; use --raw to prompt without it")
