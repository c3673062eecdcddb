"""The process in which a chat template runs: sandboxed Jinja under limits on memory and processor time.

Run as a script by `rkf.text.template`, never imported: one JSON request on stdin, the text on stdout. The sandbox
keeps a template from reaching Python; only a process of its own keeps `'a' * 10**10` or a nested loop from taking the
machine. Exit codes: 0 rendered, 2 the template refused the messages (`raise_exception`), 4 it cannot be rendered.
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
    """`{% generation %} … {% endgeneration %}` marks text to train on; here its body is simply output."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares a set

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)


def render(request):
    """The text of a request: template, variables, now (ISO date and time), max_chars."""
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
    # Jinja's own filter escapes HTML, which would put \u003c in a prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message):
    raise Refusal(message)


def _limit(memory_bytes, cpu_seconds):
    try:
        import resource
    except ImportError:  # no such limits on Windows; the parent's clock remains
        return
    wanted = {resource.RLIMIT_CPU: cpu_seconds}
    if sys.platform != "darwin":  # which refuses to bound addresses
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
    # What a template can raise: Jinja's errors, and whatever Python raises for its expressions.
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
