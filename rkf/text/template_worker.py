"""The process in which a chat template runs: sandboxed Jinja with limits on memory and CPU time.

`rkf.text.template_pool` runs it as a script and never imports it. The sandbox keeps a template away from Python. The
separate process stops `'a' * 10**10` and nested loops from using up the machine.

On stdin come requests: a template and JSON, each after its length as u64. Each is rendered in a forked child with
limits of its own. To stdout go the child's exit code as i32, the length of its output as u64 (both little-endian), and
the output. Exit codes: 0 rendered, 2 the template refused the messages (`raise_exception`), 4 it cannot be rendered.

A child before it has compiled the template, under the same limits. Its code is kept for later requests, because
compiling takes several times as long as rendering.
"""

import json
import marshal
import os
import struct
import sys
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

REFUSED, FAILED = 2, 4
MOST_CODE = 4 << 20  # bytes of a compiled template that is kept
MOST_TEMPLATES = 8  # of which code is kept


class Refusal(Exception):
    """The template called `raise_exception`."""


class GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}` marks text for training; here its body is just output."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares a set

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)


def environment():
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    found.filters["tojson"] = _tojson
    found.globals["raise_exception"] = _refuse
    return found


def compiled(template, request):
    """The code of a template, marshalled."""
    return marshal.dumps(environment().compile(template.decode("utf-8", "surrogatepass")))


def rendered(code, request):
    """The text for a request with the keys variables, now (ISO date and time), max_chars."""
    jinja = environment()
    jinja.globals["strftime_now"] = datetime.fromisoformat(request["now"]).strftime
    template = jinja.template_class.from_code(jinja, marshal.loads(code), jinja.make_globals(None))
    pieces, room = [], request["max_chars"]
    for piece in template.generate(request["variables"]):
        room -= len(piece)
        if room < 0:
            raise MemoryError(f"more than {request['max_chars']} characters")
        pieces.append(piece)
    return "".join(pieces).encode("utf-8", "surrogatepass")


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


def answer(task, source, data):
    """(exit code, output) of a task, `compiled` or `rendered`, for a request."""
    request = json.loads(data)
    _limit(request["memory_bytes"], request["cpu_seconds"])
    try:
        return 0, task(source, request)
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


def in_child(task, source, data):
    """(exit code or minus a signal, output) of a task, from a forked process."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        code = FAILED
        try:
            os.close(readable)
            code, output = answer(task, source, data)
            with open(writable, "wb") as pipe:  # noqa: PTH123 - a descriptor
                pipe.write(output)
        finally:
            os._exit(code)
    os.close(writable)
    with open(readable, "rb") as pipe:  # noqa: PTH123 - a descriptor
        output = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


def _part(head):
    return sys.stdin.buffer.read(int.from_bytes(head, "little"))


def main():
    known: dict[bytes, bytes] = {}
    while head := sys.stdin.buffer.read(8):
        template, data = _part(head), _part(sys.stdin.buffer.read(8))
        code, output = (0, known[template]) if template in known else in_child(compiled, template, data)
        if code == 0:
            if len(output) <= MOST_CODE:
                known[template] = output
            if len(known) > MOST_TEMPLATES:
                del known[next(iter(known))]
            code, output = in_child(rendered, output, data)
        sys.stdout.buffer.write(struct.pack("<iQ", code, len(output)) + output)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
