"""``nopin bench``: perftest's tests over nopin, each beside what the machine can do without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import click
import msgspec
from click.core import ParameterSource

from nopin.cli import bench_managed, bench_model, perftest
from nopin.cli.options import examples, json_option, size
from nopin.cli.output import put, put_json, say
from nopin.errors import UsageError
from nopin.lab.bench import Bench, Floors, local_benches, measure, remote_bench
from nopin.lab.bench_peer import attend
from nopin.lab.bench_spec import (
    ALL_SIZES_BYTES,
    ATOMIC_BYTES,
    DEFAULT_ITERATIONS,
    DEFAULT_SIZE_BYTES,
    MEMORIES,
    TESTS,
    BenchSpec,
    check,
)
from nopin.lab.figures import Figure, ratio
from nopin.lab.floor import measure_floors
from nopin.lab.rendezvous import DEFAULT_PORT, accept, listen

OTHERS = ("floor", *bench_managed.TESTS, bench_model.TEST)
"""Tests that are always the same, and so take no options but -j."""
PORT = click.IntRange(1, 65535)


@click.command(
    epilog=examples(
        "nopin bench floor",
        "nopin bench write_bw -s 1m",
        "nopin bench read_lat --direct",
        "nopin bench write_bw -s 4k --versus pinned",
        "nopin bench write_bw --listen 192.0.2.1   # on one host, and on another:",
        "nopin bench write_bw 192.0.2.1",
    )
)
@click.argument("test", metavar="TEST", type=click.Choice([*TESTS, *OTHERS]))
@click.argument("host", required=False)
@click.option("-s", "--size", callback=size, metavar="SIZE", help="Message size: 65536, 64k, 1m.")
@click.option("-a", "--all", "all_sizes", is_flag=True, help="All sizes from 2 bytes to 8 MiB.")
@click.option("-n", "--iters", "n_iterations", type=int, help="Messages of each size and queue pair.")
@click.option("-D", "--duration", "duration_s", type=float, help="Seconds for each size, instead of -n.")
@click.option("-q", "--qp", "n_queue_pairs", type=int, default=1, show_default=True, help="Queue pairs.")
@click.option("-t", "--tx-depth", type=int, default=128, show_default=True, help="Messages under way.")
@click.option("--mtu", "path_mtu", type=int, help="Path MTU: 256 to 4096; default the largest.")
@click.option("--odp", "memory", flag_value="on-demand", default=True, help="On-demand memory (default).")
@click.option("--pinned", "memory", flag_value="pinned", help="Pinned memory.")
@click.option("--short", "memory", flag_value="short-term", help="Memory held for each operation.")
@click.option("--managed", "memory", flag_value="managed", help="Managed memory, all of it resident.")
@click.option("--versus", type=click.Choice(MEMORIES), help="Measure this memory too, by turns, and the ratio to it.")
@click.option("--direct", is_flag=True, help="Both ends on one server: no network, a direct copy.")
@click.option("--listen", is_flag=False, flag_value="127.0.0.1", metavar="[ADDR]", help="Be the passive end.")
@click.option(
    "--port",
    type=PORT,
    default=DEFAULT_PORT,
    show_default=True,
    help="TCP port of the passive end.",
)
@click.option("--no-floor", is_flag=True, help="Do not measure the floor beside it.")
@click.option("--report_gbits", "gbits", is_flag=True, help="Rates in Gb/s instead of MiB/s.")
@json_option
@click.pass_context
def command(ctx: click.Context, /, test: str, host: str | None, listen: str | None, port: int, **options: Any) -> int:
    """Measure operations and faults beside what this machine can do.

    TEST is write_bw, read_bw, send_bw, write_lat, read_lat, send_lat or atomic_lat, in perftest's form; floor, what
    this machine does without RDMA; fault or overcommit, of managed memory; model, the modelled machine.

    Without HOST both ends run here, each with a server of its own, the target memory in a third process.
    """
    if test in OTHERS:
        _refuse_options(ctx, test)
    if host is not None and listen is not None:
        raise click.UsageError("HOST makes this the active end and --listen the passive one; give one of them")
    if test == "floor":
        _floor(as_json=options["as_json"])
    elif test in bench_managed.TESTS:
        return bench_managed.run(test, as_json=options["as_json"])
    elif test == bench_model.TEST:
        return bench_model.run(as_json=options["as_json"])
    elif listen is not None:
        _listen(listen, port)
    else:
        _measure(_spec(test, **options), host, port, **options)
    return 0


def _refuse_options(ctx: click.Context, test: str) -> None:
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if given - {"test", "as_json"}:
        raise click.UsageError(f"{test} is always the same measurement: it takes no HOST and no option but -j")


def _spec(
    test: str,
    *,
    size: int | None,
    all_sizes: bool,
    n_iterations: int | None,
    duration_s: float | None,
    n_queue_pairs: int,
    tx_depth: int,
    path_mtu: int | None,
    memory: str,
    **_others: Any,
) -> BenchSpec:
    kind = test.split("_")[1]
    default = ATOMIC_BYTES if test == "atomic_lat" else DEFAULT_SIZE_BYTES[kind]
    if size is not None and all_sizes:
        raise UsageError("-s is one size and -a is all of them; give one of them")
    return check(
        BenchSpec(
            test=test,
            sizes_bytes=list(ALL_SIZES_BYTES) if all_sizes else [default if size is None else size],
            n_iterations=DEFAULT_ITERATIONS[kind] if n_iterations is None else n_iterations,
            duration_s=duration_s,
            n_queue_pairs=n_queue_pairs,
            tx_depth=tx_depth,
            path_mtu=path_mtu,
            memory=memory,
        )
    )


def _floor(*, as_json: bool) -> None:
    figures = measure_floors()
    if as_json:
        put_json({"floors": figures})
        return
    for line in perftest.floor_lines(figures):
        put(line)


def _listen(address: str, port: int) -> None:
    with listen(address, port) as listener:
        say(f"waiting for an active end on {address}:{port}; there: nopin bench TEST {address} --port {port}")
        line = accept(listener)
    with closing(line):
        attend(line, None)


def _measure(
    spec: BenchSpec,
    host: str | None,
    port: int,
    *,
    versus: str | None,
    direct: bool,
    no_floor: bool,
    gbits: bool,
    as_json: bool,
    **_others: Any,
) -> None:
    if host is not None and (direct or versus):
        raise click.UsageError("--direct and --versus are for two ends on this host, so without HOST")
    if versus == spec.memory:
        raise click.UsageError(f"--versus {versus} compares {versus} memory with itself; name another")
    path = "nopin direct" if direct else f"nopin to {host or 'loopback'}"
    with_floor = host is None and not no_floor  # of another host's path we cannot measure the floor
    specs = [spec] if versus is None else [spec, msgspec.structs.replace(spec, memory=versus)]
    results: list[list[Figure]] = []
    with _benches(specs, host, port, direct=direct) as benches, closing(Floors(spec, direct=direct)) as floors:
        if not as_json:
            mtu, local = benches[0].ready.path_mtu, benches[0].end.coordinates()
            for line in perftest.heading(spec, path=path, path_mtu=mtu, local=local, gbits=gbits):
                put(line)
        for size in spec.sizes_bytes:
            results.append(measure(benches, size, floors.matching(size) if with_floor else None))
            if not as_json:
                for line in perftest.rows(results[-1], [each.memory for each in specs], gbits=gbits):
                    put(line)
    if as_json:
        put_json({"spec": spec, "path": path, "results": [_as_json(figures, versus) for figures in results]})
    else:
        put(perftest.RULE)


def _as_json(figures: list[Figure], versus: str | None) -> dict[str, Any]:
    """Return one size's result: of two figures the first, with the second and the ratio to it."""
    ours, *others = figures
    if versus is None:
        return ours.as_json()
    (other,) = others
    return {**ours.as_json(), versus: other.as_json(), f"ratio_to_{versus.replace('-', '_')}": ratio(ours, other)}


@contextmanager
def _benches(specs: list[BenchSpec], host: str | None, port: int, *, direct: bool) -> Iterator[list[Bench]]:
    if host is None:
        with local_benches(specs, direct=direct) as benches:
            yield benches
    else:
        (spec,) = specs
        with remote_bench(spec, host, port) as bench:
            yield [bench]
