"""``nopin stress``: everybody at once on one arena of managed memory, and every word that is read is judged."""

from __future__ import annotations

import secrets

import click
from rich.table import Table

from nopin.cli.options import Seconds, examples, json_option
from nopin.cli.output import put, put_json, say, show
from nopin.lab.stress.run import run_stress
from nopin.lab.stress.spec import StressFigures, StressSpec
from nopin.units import PAGE_BYTES, format_bytes

_SHOWN = {
    "page faults": ("faults_zero", "faults_swap", "faults_minor", "faults_protect", "faults_device"),
    "pages evicted": ("evicted",),
    "pages read from swap": ("swapped_in",),
    "pages lost": ("lost",),
}


@click.command(epilog=examples("nopin stress", "nopin stress --seconds 60 --kills 5 --seed 7"))
@click.option("--seed", type=int, help="Decides what everybody does; default random, printed.")
@click.option("--seconds", type=Seconds(0.1), default=10.0, show_default=True, help="Seconds that it runs.")
@click.option("--kills", type=click.IntRange(0), default=0, show_default=True, help="Kill the server so often at most.")
@json_option
def command(seed: int | None, seconds: float, kills: int, as_json: bool) -> int:
    """Work on one array from all sides at once and judge every read.

    CPUs, peers, an accelerator and the pager share an array that does not fit. Exits with 0 if every word was one that
    could be there, else with 1: each wrong one is printed with what was allowed. The order in which things happen is
    the machine's; a seed says only what everybody does.
    """
    spec = StressSpec(secrets.randbelow(1 << 31) if seed is None else seed, seconds, kills)
    say(f"seed {spec.seed}, {spec.seconds:g} s, {spec.kills} kills")
    figures = run_stress(spec, say)
    if as_json:
        put_json(figures)
    else:
        show(table_of(figures))
        for line in sentences(figures):
            put(line)
    return 0 if figures.as_promised else 1


def table_of(figures: StressFigures) -> Table:
    """Return who did how much."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"{figures.seconds:.1f} s, seed {figures.seed}")
    for title in ("reads", "writes", "words checked", "interrupted"):
        table.add_column(title, justify="right")
    table.add_column("besides")
    for tally in figures.tallies:
        besides = ", ".join(f"{name} {n}" for name, n in sorted(tally.operations.items()))
        counts = (tally.reads, tally.writes, tally.words_checked, tally.interrupted)
        table.add_row(tally.who, *(str(n) for n in counts), besides)
    return table


def sentences(figures: StressFigures) -> list[str]:
    """Say what came of it."""
    said = []
    if figures.pager:
        counted = (f"{sum(figures.pager[key] for key in keys)} {name}" for name, keys in _SHOWN.items())
        most = format_bytes(figures.resident_bytes_max)
        said.append(f"{format_bytes(figures.n_pages * PAGE_BYTES)} with at most {most} resident: {', '.join(counted)}.")
    if not figures.as_promised:
        said.append("The arena: " + ", ".join(f"{name} {n}" for name, n in figures.pager.items()))
    said += [f"WRONG {violation} (seed {figures.seed})" for violation in figures.violations]
    said += [f"FAILED {failure}" for failure in figures.failures]
    n_words = sum(tally.words_checked for tally in figures.tallies)
    n_wrong = len(figures.violations)
    said.append(f"{n_words} words checked, {n_wrong} wrong; {len(figures.failures)} failures, {figures.kills} kills.")
    return said
