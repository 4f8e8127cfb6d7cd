"""Middleware from a line of text, as ``nopin serve --chaos`` takes it."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TextIO

from nopin.errors import UsageError
from nopin.link.base import Link
from nopin.link.faults import FaultyLink
from nopin.link.pcap import PcapLink
from nopin.link.tracer import TracerLink
from nopin.units import MS_NS, S_NS, US_NS

_PROBABILITIES = {"loss": "loss", "dup": "duplicate", "reorder": "reorder", "corrupt": "corrupt"}
_UNIT_NS = {"ns": 1, "us": US_NS, "ms": MS_NS, "s": S_NS}
_KEYS = (*_PROBABILITIES, "delay", "seed", "pcap", "trace")
_EXAMPLE = "loss=0.01,dup=0.01,delay=50us,seed=7,pcap=/tmp/x.pcapng"


def wrap(link: Link, spec: str, *, clock_offset_ns: int = 0) -> Link:
    """Put middleware around a link.

    Args:
        link: what really sends.
        spec: ``key=value`` pairs with commas between. ``loss``, ``dup``, ``reorder``, ``corrupt``: probability
            for each sent packet; ``delay``: such as 50us; ``seed``: of these faults, 0 unless given; ``pcap``,
            ``trace``: files that record what passes below the faults, so what the wire really saw. Empty:
            nothing is added.
        clock_offset_ns: what to add to `now` for nanoseconds since 1970, in captures.

    Raises:
        UsageError: a key is unknown or given twice, or a value has no meaning; nothing was opened.
        OSError: a file cannot be made.
    """
    options = _parse(spec)
    faults = {name: _probability(key, options[key]) for key, name in _PROBABILITIES.items() if key in options}
    delay_ns = _duration_ns(options.get("delay", "0ns"))
    seed = _seed(options.get("seed", "0"))
    if "pcap" in options:
        link = PcapLink(link, options["pcap"], clock_offset_ns)
    if "trace" in options:
        link = _FileTracer(link, open(options["trace"], "w", buffering=1))  # noqa: SIM115  # closed by the link
    if faults or delay_ns:
        link = FaultyLink(link, seed=seed, delay_ns=delay_ns, **faults)
    return link


class _FileTracer(TracerLink):
    """A tracer that owns its file."""

    def __init__(self, inner: Link, file: TextIO) -> None:
        super().__init__(inner, self._write_line)
        self._file = file

    def close(self) -> None:
        """Close the file and the inner link."""
        with suppress(OSError):  # a full disk again
            self._file.close()
        super().close()

    def _write_line(self, line: str) -> None:
        try:
            self._file.write(line + "\n")
        except OSError:
            self._write = _discard  # the disk is full: packets go on without a trace


def _discard(line: str) -> None:
    """Write nothing."""


def _parse(spec: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for pair in filter(None, (part.strip() for part in spec.split(","))):
        key, equals, value = pair.partition("=")
        if key not in _KEYS or not equals or not value:
            raise UsageError(f"{pair!r}: known are {', '.join(_KEYS)}, each with a value; such as {_EXAMPLE}")
        if key in options:
            raise UsageError(f"{key} is given twice in {spec!r}")
        options[key] = value
    return options


def _probability(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"{key}={text}: must be a probability between 0 and 1, such as {key}=0.01")
    return value


def _duration_ns(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ns|us|ms|s)", text)
    if match is None:
        raise UsageError(f"delay={text}: must be a time with its unit, such as delay=50us")
    return int(float(match.group(1)) * _UNIT_NS[match.group(2)])


def _seed(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError as error:
        raise UsageError(f"seed={text}: must be a whole number") from error
