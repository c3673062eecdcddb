"""Every option that is a number, of every command: odd values are refused while the command line is parsed."""

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from rkf.cli import cli
from rkf.commands.quantities import Finite, Integer, Numbers, Size

QUANTITIES = (Integer, Finite, Size, Numbers)
ODD = (
    *("nan", "inf", "-inf", "1e400", "-1e400", "1" + "0" * 400, "9" * 5000, "-" + "9" * 5000, "1e-", "0x10"),
    *("", " ", "-", ".", "x", "1_0", "٣", "５", "1 0", "1,5,", "5-2", "0-999999999999", "1\x00", "\x1b[31m", "\udcff"),
)


def numbers(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Parameter]]:
    if isinstance(command, click.Group):
        for name, member in command.commands.items():
            yield from numbers(member, (*path, name))
        return
    for parameter in command.params:
        if isinstance(parameter.type, QUANTITIES):
            yield path, parameter


FOUND = list(numbers(cli))


def members(command: click.Command) -> Iterator[click.Command]:
    yield command
    for member in getattr(command, "commands", {}).values():
        yield from members(member)


def test_numbers_have_these_types_alone():
    plain = (click.types.IntParamType, click.types.FloatParamType)
    for command in members(cli):
        for parameter in command.params:
            assert isinstance(parameter.type, QUANTITIES) or not isinstance(parameter.type, plain), parameter.opts
    assert len(FOUND) > 60


def refused(path: tuple[str, ...], parameter: click.Parameter, value: str) -> None:
    """The command is given nothing but the value, so that work would begin with another complaint."""
    done = CliRunner().invoke(cli, [*path, f"{parameter.opts[-1]}={value}"])
    last = done.stderr.splitlines()[-1]
    assert (done.exit_code, done.stdout) == (2, ""), (value, done.output)
    assert last.startswith(f"Error: Invalid value for '{parameter.opts[0]}'"), (value, last)
    assert len(last) < 250 and last.isprintable(), last


@pytest.mark.parametrize(("path", "parameter"), FOUND, ids=[f"{' '.join(path)} {each.name}" for path, each in FOUND])
def test_odd_values_are_refused(path, parameter):
    for value in ODD:
        refused(path, parameter, value)
    kind = parameter.type
    if isinstance(kind, Numbers):
        for value in (f"{kind.most + 1}", f"1-{kind.most + 1}", *([f"{kind.least - 1}"] if kind.least else [])):
            refused(path, parameter, value)
        return
    if isinstance(kind, Size):
        refused(path, parameter, "0"), refused(path, parameter, "-1")
        return
    if kind.min is not None:
        refused(path, parameter, f"{kind.min if kind.min_open else kind.min - 1}")
    if kind.max is not None:
        refused(path, parameter, f"{kind.max + 1}")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Integer(1), "2147483647", 2147483647),
        (Integer(0, (1 << 64) - 1), "18446744073709551615", 18446744073709551615),
        (Integer(-5), "-5", -5),
        (Integer(0), "007", 7),
        (Finite(0), "1e-320", 1e-320),
        (Finite(-2, 2), "-.5", -0.5),
        (Finite(0, 1), "1.", 1.0),
        (Size(), " 1.2 GB ", 1_200_000_000),
        (Numbers(0, 9), "0, 4-7,9-9", [0, 4, 5, 6, 7, 9]),
    ],
)
def test_what_numbers_mean(kind, text, value):
    assert kind.convert(text, None, None) == value
