"""The process in which a chat template runs: sandboxed Jinja with limits on memory and CPU time.

`rkf.text.template_pool` runs it as a script and never imports it. The sandbox keeps a template away from Python. The
separate process stops `'a' * 10**10` and nested loops from using up the machine.

On stdin come requests: their length as u64, then JSON. Each is rendered in a forked child with limits of its own. To
stdout go the child's exit code as i32, the length of its output as u64 (both little-endian), and the output. Exit
codes: 0 rendered, 2 the template refused the messages (`raise_exception`), 4 it cannot be rendered.
"""

import json
import os
import struct
import sys
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

REFUSED, FAILED = 2, 4


class Refusal(Exception):
    """The template called `raise_exception`."""


class GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}` marks text for training; here its body is just output."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares a set

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)


def render(request):
    """The text for a request with the keys template, variables, now (ISO date and time), max_chars."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = datetime.fromisoformat(request["now"]).strftime
    pieces, room = [], request["max_chars"]
    for piece in environment.from_string(request["template"]).generate(request["variables"]):
        room -= len(piece)
        if room < 0:
            raise MemoryError(f"more than {request['max_chars']} characters")
        pieces.append(piece)
    return "".join(pieces)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes HTML, so it would put \u003c into a prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message):
    raise Refusal(message)


def _limit(memory_bytes, cpu_seconds):
    try:
        import resource
    except ImportError:  # Windows has no such limits; the parent's clock still applies
        return
    wanted = {resource.RLIMIT_CPU: cpu_seconds}
    if sys.platform != "darwin":  # macOS cannot limit the address space
        wanted[resource.RLIMIT_AS] = memory_bytes
    for which, most in wanted.items():
        hard = resource.getrlimit(which)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (least, least))


def answer(data):
    """(exit code, output) of a request."""
    request = json.loads(data)
    _limit(request["memory_bytes"], request["cpu_seconds"])
    try:
        return 0, render(request).encode("utf-8", "surrogatepass")
    except Refusal as refusal:
        return REFUSED, _message(str(refusal))
    # A template can raise Jinja's errors and any error that Python raises for its expressions.
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as e:
        return FAILED, _message(f"{type(e).__name__}: {e}")


def _message(text):
    return text[:500].encode(errors="replace")


def in_child(data):
    """(exit code or minus a signal, output) of a request, from a forked process."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        code = FAILED
        try:
            os.close(readable)
            code, output = answer(data)
            with open(writable, "wb") as pipe:  # noqa: PTH123 - a descriptor
                pipe.write(output)
        finally:
            os._exit(code)
    os.close(writable)
    with open(readable, "rb") as pipe:  # noqa: PTH123 - a descriptor
        output = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


def main():
    while head := sys.stdin.buffer.read(8):
        code, output = in_child(sys.stdin.buffer.read(int.from_bytes(head, "little")))
        sys.stdout.buffer.write(struct.pack("<iQ", code, len(output)) + output)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
