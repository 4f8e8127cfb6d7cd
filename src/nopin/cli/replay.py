"""``nopin replay``: a counter-example, event by event."""

from __future__ import annotations

from pathlib import Path

import click

from nopin.cli.exits import COUNTER_EXAMPLE
from nopin.cli.options import examples, json_option
from nopin.cli.output import put, put_json, say
from nopin.model.explore.record import load, replay
from nopin.model.trace import Event

KEY = """\
*      here somebody else goes on than in the plainest schedule, where each runs until it waits
event  counts the steps, from 0
us     virtual time in microseconds
who    whose step it is; (n) tells apart those of one name
what   what the step ended with: an effect it asked for, or "ends"; lines that begin with - are no steps"""


@click.command(epilog=examples("nopin replay cex.json", "nopin replay cex.json --from 30 --until 41"))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--until", type=click.IntRange(0), help="Last event to show.")
@click.option("--from", "first", type=click.IntRange(0), default=0, help="First event to show.")
@json_option
def command(file: Path, until: int | None, first: int, as_json: bool) -> int:
    """Run the schedule in FILE again, and print each event.

    Ends with exit code 4 if it breaks the same property as when it was found, with 1 if it does not.
    """
    example = load(file)
    seen = replay(example)
    breach, trace = seen.breach, seen.trace
    events = trace.events[first : None if until is None else until + 1]
    same_trace = trace.digest() == example.trace
    broken = None if breach is None else breach.which
    if as_json:
        put_json(
            {
                "counter_example": example,
                "events": [
                    {
                        "event": each.number,
                        "turn": each.number in seen.turns,
                        "now_ns": each.now_ns,
                        "who": each.task,
                        "what": each.what,
                    }
                    for each in events
                ],
                "broken": broken,
                "detail": None if breach is None else breach.detail,
                "same_trace": same_trace,
            }
        )
    else:
        code = f"with the mutant {example.mutant}" if example.mutant else "with the code as it is"
        say(f"{example.scenario}, {code}; choices {' '.join(map(str, example.choices)) or 'all ordinary'}")
        say(KEY)
        for line in _lines(events, seen.turns):
            put(line)
    if breach is None:
        say("nothing breaks any more")
    elif until is None or until + 1 >= len(trace.events):
        say(f"{breach.which}: {breach.detail}")
    if not same_trace:
        say("the events are not those of when it was found: the code has changed since")
    return COUNTER_EXAMPLE if broken == example.property else 1


def _lines(events: list[Event], turns: list[int]) -> list[str]:
    width = max((len(each.task) for each in events), default=3)
    lines = [f"  {'event':>5} {'us':>9}  {'who':<{width}}  what"]
    for each in events:
        mark = "*" if each.number in turns else " "
        lines.append(f"{mark} {each.number:>5} {each.now_ns / 1000:>9.1f}  {each.task:<{width}}  {each.what}")
    return lines
