"""The process in which a chat template runs: sandboxed Jinja with limits on memory and CPU time.

`rkf.text.template` runs it as a script and never imports it. One JSON request comes on stdin; the text goes to stdout.
The sandbox keeps a template away from Python. The separate process stops `'a' * 10**10` and nested loops from using up
the machine. Exit codes: 0 rendered, 2 the template refused the messages (`raise_exception`), 4 it cannot be rendered.
"""

import json
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


def main():
    request = json.load(sys.stdin.buffer)
    _limit(request["memory_bytes"], request["cpu_seconds"])
    try:
        text = render(request)
    except Refusal as refusal:
        return _fail(REFUSED, str(refusal))
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
        return _fail(FAILED, f"{type(e).__name__}: {e}")
    sys.stdout.buffer.write(text.encode("utf-8", "surrogatepass"))
    return 0


def _fail(code, message):
    sys.stderr.write(message[:500])
    return code


if __name__ == "__main__":
    sys.exit(main())
