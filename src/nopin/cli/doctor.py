"""``nopin doctor``: what this host allows, feature by feature, with the remedy."""

from __future__ import annotations

import click
import msgspec
from rich.table import Table

from nopin.cli.exits import HOST_LACKS
from nopin.cli.options import examples, json_option
from nopin.cli.output import put_json, say, show
from nopin.linux.probe import Feature, probe_all

REQUIRED = frozenset({"process_vm", "memfd", "pidfd"})
"""Without these nothing of nopin works; every other feature has a fall-back or is left out."""


@click.command(epilog=examples("nopin doctor", "nopin doctor -j"))
@json_option
def command(as_json: bool) -> int:
    """Tell what this host allows, and what would allow the rest.

    Ends with 3 when something is missing that nothing works without.
    """
    features = probe_all()
    lacking = [feature for feature in features if feature.name in REQUIRED and not feature.available]
    if as_json:
        put_json({"features": [_row(feature) for feature in features], "usable": not lacking})
    else:
        show(_table(features))
    for feature in lacking:
        say(f"nopin cannot work here without {feature.name}: {feature.detail}; {feature.remedy}")
    return HOST_LACKS if lacking else 0


def _row(feature: Feature) -> dict[str, object]:
    row: dict[str, object] = msgspec.to_builtins(feature)
    return row | {"required": feature.name in REQUIRED}


def _table(features: list[Feature]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("feature", "", "what was seen", "remedy"):
        table.add_column(title, overflow="fold")
    for feature in features:
        mark = "[green]yes[/]" if feature.available else "[red]no[/]"
        table.add_row(feature.name, mark, feature.detail, "" if feature.available else feature.remedy)
    return table
