"""``nopin serve``: run a device server."""

from __future__ import annotations

from pathlib import Path

import click

from nopin.cli.output import say
from nopin.control.paths import default_socket_path
from nopin.server.config import ServeConfig
from nopin.server.service import serve

SPIN_US = 50


@click.command
@click.option("--bind", metavar="ADDR", help="Address for peers; default: a loopback address of its own.")
@click.option("--socket", "socket_path", type=click.Path(path_type=Path), help="Unix socket for clients.")
@click.option("--exchange-port", type=click.IntRange(0, 65535), default=0, help="TCP port where peers attach.")
@click.option("--chaos", metavar="SPEC", help="Trouble on the link: loss=0.01,dup=0.01,seed=7,pcap=FILE.")
@click.option("--raw", is_flag=True, help="Check the ICRC of foreign senders too (needs root).")
@click.option(
    "--spin-us",
    type=click.IntRange(0),
    default=SPIN_US,
    show_default=True,
    help="Longest look for work before sleeping.",
)
@click.option("--child-of", type=int, metavar="PID", help="End when this process ends.")
@click.option("--ready-fd", type=int, metavar="FD", help="Write one byte here once clients can connect.")
def command(
    bind: str | None,
    socket_path: Path | None,
    exchange_port: int,
    chaos: str | None,
    raw: bool,
    spin_us: int,
    child_of: int | None,
    ready_fd: int | None,
) -> None:
    """Run a device server until it is told to stop (Ctrl-C, SIGTERM).

    Peers reach it on loopback only, unless --bind gives an address. Programs of this user find it by default;
    without one they start their own.
    """
    path = socket_path or default_socket_path()
    if child_of is None:
        say(f"serving on {path}; stop with Ctrl-C")
    serve(
        ServeConfig(
            socket_path=path,
            bind=bind,
            exchange_port=exchange_port,
            parent_pid=child_of,
            ready_fd=ready_fd,
            chaos=chaos,
            raw=raw,
            spin_us=spin_us,
        )
    )
