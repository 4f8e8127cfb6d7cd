"""``nopin serve``: run a device server."""

from __future__ import annotations

from pathlib import Path

import click

from nopin.cli.options import examples, size, socket_option
from nopin.cli.output import say
from nopin.control.paths import default_socket_path
from nopin.server.config import SWAP_LIMIT_BYTES, ServeConfig
from nopin.server.service import serve
from nopin.units import PAGE_BYTES

SPIN_US = 50
CHAOS = "Trouble on the link, of loss, dup, reorder, corrupt, delay, seed, pcap, trace: loss=0.01,seed=7,pcap=FILE."


@click.command(
    epilog=examples(
        "nopin serve",
        "nopin serve --bind 192.0.2.1",
        "nopin serve --socket b/server.sock --chaos loss=0.01,seed=7,pcap=b.pcapng",
    )
)
@click.option("--bind", metavar="ADDR", help="Address for peers; default: a loopback address of its own.")
@socket_option
@click.option(
    "--exchange-port",
    type=click.IntRange(0, 65535),
    default=0,
    help="TCP port where peers attach; default: a free one.",
)
@click.option("--chaos", metavar="SPEC", help=CHAOS)
@click.option("--raw", is_flag=True, help="Check the ICRC of foreign senders too (needs root).")
@click.option(
    "--spin-us",
    type=click.IntRange(0),
    default=SPIN_US,
    show_default=True,
    help="Microseconds to look for work before sleeping.",
)
@click.option(
    "--swap-dir",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default="/var/tmp",
    show_default=True,
    help="Where managed memory goes that may not stay; on a disk.",
)
@click.option("--swap-limit", callback=size, metavar="SIZE", help="The most swap one arena may take; default: 1 TiB.")
@click.option("--swap-compress/--no-swap-compress", default=True, show_default=True, help="Store pages compressed.")
@click.option("--push-mappings", is_flag=True, help="Give devices managed pages as they become present, unasked.")
@click.option("--memory", callback=size, metavar="SIZE", help="Most that is resident; default: half the machine's.")
@click.option("--takeover", is_flag=True, help="Go on with managed memory and shares of a killed server.")
@click.option("--child-of", type=int, metavar="PID", help="End when this process ends.")
@click.option("--ready-fd", type=int, metavar="FD", help="Write one byte here once clients can connect.")
def command(
    bind: str | None,
    socket_path: Path | None,
    exchange_port: int,
    chaos: str | None,
    raw: bool,
    spin_us: int,
    swap_dir: Path,
    swap_limit: int | None,
    swap_compress: bool,
    push_mappings: bool,
    memory: int | None,
    takeover: bool,
    child_of: int | None,
    ready_fd: int | None,
) -> None:
    """Run a device server until it is told to stop (Ctrl-C, SIGTERM).

    Peers reach it on loopback only, unless --bind gives an address. Programs of this user find it by default;
    without one they start their own.
    """
    if memory is not None and memory < PAGE_BYTES:
        raise click.UsageError(f"--memory {memory} bytes: managed memory needs a page at least")
    path = socket_path or default_socket_path()
    config = ServeConfig(
        socket_path=path,
        bind=bind,
        exchange_port=exchange_port,
        parent_pid=child_of,
        ready_fd=ready_fd,
        chaos=chaos,
        raw=raw,
        spin_us=spin_us,
        swap_dir=swap_dir,
        swap_limit_bytes=SWAP_LIMIT_BYTES if swap_limit is None else swap_limit,
        swap_compress=swap_compress,
        push_mappings=push_mappings,
        memory_bytes=memory,
        takeover=takeover,
    )

    def say_where(host: str, port: int) -> None:
        if child_of is None:
            say(f"serving on {path}, peers attach at {host} port {port}; stop with Ctrl-C")

    serve(config, say_where)
