"""This host as a machine of the model: measured by the floors of `nopin bench floor`, kept with date and kernel.

A calibration belongs to the host it was made on. It is kept under XDG_STATE_HOME, never in the project, because figures
of one machine in another's repository are read as references sooner or later.
"""

from __future__ import annotations

import mmap
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from nopin.errors import HostLacks
from nopin.lab.floor import measure_floors
from nopin.lab.floor_fault import OneFaultFloor
from nopin.lab.rounds import measure_all
from nopin.linux.cpus import n_cpus
from nopin.model.costs import NAMES
from nopin.model.presets import THIS_HOST, Figure, Preset
from nopin.units import PAGE_BYTES

_TOUCH_BYTES = 64 << 20
_N_ROUNDS = 5


class Calibration(msgspec.Struct, frozen=True):
    """A calibration run.

    Attributes:
        date: when, in ISO form. kernel: as `uname -sr` says. n_cpus: this process could use.
        figures: parameters of `model.costs` by name.
    """

    date: str
    kernel: str
    n_cpus: int
    figures: dict[str, int]


def calibration_path() -> Path:
    """Return where the calibration of this host is kept."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "nopin" / f"{THIS_HOST}.json"


def calibrate() -> Calibration:
    """Measure this host: about ten seconds.

    Raises:
        HostLacks: the kernel refuses something a floor needs.
    """
    floors = {figure.name: figure.median for figure in measure_floors()}
    figures = {
        "n_cpus": n_cpus(),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memcpy_bytes_per_s": floors["memcpy_1048576"],
        "wake_same_cpu_ns": floors["eventfd_pingpong_one_cpu"] / 2,
        "wake_other_cpu_ns": floors["eventfd_pingpong"] / 2,
        "line_rate_bits_per_s": floors["udp_crc"] * 8,
        "cpu_minor_fault_read_ns": _touch_ns(write=False),
        "cpu_minor_fault_write_ns": _touch_ns(write=True),
    }
    with suppress(HostLacks):  # then it stays inherited, and is said to be
        figures["uffd_round_trip_ns"] = _uffd_ns()
    kernel = os.uname()
    return Calibration(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        kernel=f"{kernel.sysname} {kernel.release}",
        n_cpus=n_cpus(),
        figures={name: round(value) for name, value in figures.items()},
    )


def store(calibration: Calibration) -> Path:
    """Keep a calibration in place of the one before; returns where."""
    path = calibration_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n")
    return path


def measured_presets() -> dict[str, Preset]:
    """Return this host as a preset, if it was ever calibrated and the file can be read."""
    try:
        calibration = msgspec.json.decode(calibration_path().read_bytes(), type=Calibration)
    except (OSError, msgspec.DecodeError):
        return {}
    source = f"calibrated {calibration.date} on {calibration.kernel}"
    figures = {
        name: Figure(value, "L", source)
        for name, value in calibration.figures.items()
        if name in NAMES  # others are of another version
    }
    return {THIS_HOST: Preset(THIS_HOST, f"this host, {source}", figures, notes="Its devices are inherited.")}


def _touch_ns(*, write: bool) -> float:
    """Return the time of a first touch of anonymous memory, in nanoseconds: the median of some rounds."""
    rounds = []
    for _ in range(_N_ROUNDS):
        with mmap.mmap(-1, _TOUCH_BYTES) as memory:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            pages = np.frombuffer(memory, np.uint8)[::PAGE_BYTES]
            before = time.perf_counter_ns()
            if write:
                pages[:] = 1
            else:
                pages.sum()
            rounds.append((time.perf_counter_ns() - before) / len(pages))
            del pages  # the mapping cannot be closed while it is looked at
    return median(rounds)


def _uffd_ns() -> float:
    """Return the time of a store to a page that the barest loop brings."""
    floor = OneFaultFloor(4096)
    try:
        return median(measure_all([floor], n_rounds=_N_ROUNDS, seconds=0.1)[floor.name])
    finally:
        floor.close()
