"""Options and the progress bar of commands that run many points on several cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.progress import Progress

from nopin.cli.output import talk
from nopin.errors import UsageError
from nopin.lab.sweep import Sweep
from nopin.linux.cpus import n_cpus


@contextmanager
def sweeping(n_jobs: int, what: str) -> Iterator[Sweep]:
    """Give a sweep whose progress shows on a terminal."""
    with Sweep(n_jobs) as sweep, showing(sweep, what):
        yield sweep


@contextmanager
def showing(sweep: Sweep, what: str) -> Iterator[None]:
    """Show a sweep's progress on a terminal meanwhile."""
    with Progress(console=talk(), transient=True, disable=not talk().is_terminal) as bar:
        task = bar.add_task(what, total=None)
        sweep.on_point = lambda done, total: bar.update(task, completed=done, total=total)
        yield


jobs_option = click.option(
    "--jobs", type=click.IntRange(min=1), default=n_cpus, show_default="all cores", help="Processes to spread over."
)


def assignments(given: tuple[str, ...]) -> dict[str, str]:
    """Read ``--set name=value`` options.

    Raises:
        UsageError: one has no equals sign.
    """
    pairs = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not (name and equals and value):
            raise UsageError(f"--set {each!r} is not name=value")
        pairs[name.strip()] = value.strip()
    return pairs
