"""`rkf warmup`: compiles in advance what the first run would compile."""

from __future__ import annotations

import click

from rkf.commands.output import progress_bar, reporter


@click.command()
def warmup() -> None:
    """Compile all missing kernels for this CPU once, so that later starts need not."""
    from rkf.runtime.jit import warm_up

    with progress_bar("warmup", "kernel") as bar:
        done = warm_up(reporter(bar))
    click.echo(f"{done.kernels} kernels for this CPU ({done.level}) in {done.folder}")
    click.echo(f"compiled {done.compiled} of them in {done.seconds:.1f} s" if done.compiled else "nothing to compile")
