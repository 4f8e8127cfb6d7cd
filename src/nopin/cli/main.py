"""The ``nopin`` command: which subcommands there are, and how every one of them ends.

The exit codes are in `cli/exits.py`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

import click

from nopin import errors
from nopin.cli import exits
from nopin.cli.output import ReaderGone, say
from nopin.linux.interpreter import fill_standard_streams

COMMANDS = {
    "demo": "Move 512 MiB over RoCEv2, pinned and on demand, and compare.",
    "share": "Share a file in place until Ctrl-C; prints the URL to reach it.",
    "get": "Read a share, or the part of it that SLICE names.",
    "bench": "Measure operations and faults beside what this machine can do.",
    "stress": "Work on one array from all sides at once and judge every read.",
    "stat": "Show objects of a running server: all, or those that match.",
    "top": "Show live what managed memory and shared regions are doing.",
    "doctor": "Tell what this host allows, and what would allow the rest.",
    "serve": "Run a device server until it is told to stop (Ctrl-C, SIGTERM).",
    "model": "Compare disciplines on modelled machines.",
    "validate": "Run published experiments on the modelled machine.",
    "explore": "Look at every order of events of SCENARIO, or of all of them.",
    "replay": "Run the schedule in FILE again, and print each event.",
}
"""Each is the function `command` of the module of that name in nopin.cli, whose help begins so; most useful first."""


class _Commands(click.Group):
    """Loads a subcommand's module only when it is asked for, so that each starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List them without loading one: together they import half of everything."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"nopin.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        close = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if args[0] in COMMANDS or args[0].startswith("-"):
            return super().resolve_command(ctx, args)
        hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(COMMANDS)}"
        raise click.UsageError(f"no command '{args[0]}'; {hint}", ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nopin")
def cli() -> None:
    """Share a process's ordinary memory with devices and peers, without pinning it.

    Start with `nopin demo`. Figures go to standard output (-j for JSON), talk goes to standard error.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; no outcome is a traceback unless it is a bug."""
    _open_streams()
    try:
        with _signals_unwind():
            result = cli.main(args=argv, prog_name="nopin", standalone_mode=False)
            sys.stdout.flush()
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.ClickException as wrong:
        wrong.show()
        return wrong.exit_code
    except errors.UsageError as wrong:
        say(f"nopin: {wrong}")
        return exits.USAGE
    except errors.HostLacks as lacking:
        say(f"nopin: {lacking}")
        return exits.HOST_LACKS
    except (ReaderGone, BrokenPipeError):
        _silence_stdout()
        return exits.BROKEN_PIPE
    except (click.Abort, KeyboardInterrupt):
        return exits.INTERRUPTED
    except _Signalled as ended:
        return exits.SIGNALLED + ended.number
    except errors.ServerRefused as refused:
        say(f"nopin: {refused}")
        return exits.HOST_LACKS if refused.code == "host" else exits.FAILED
    except errors.NopinError as failed:
        say(f"nopin: {failed}")
        return exits.FAILED
    except OSError as failed:
        reason = errors.words_of(failed)
        say(f"nopin: {reason}" if failed.filename is None else f"nopin: {failed.filename}: {reason}")
        return exits.FAILED
    return result if isinstance(result, int) else 0


class _Signalled(BaseException):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """Have SIGTERM, and SIGHUP of a terminal that closes, end a command as Ctrl-C does: its children and files go."""

    def unwind(number: int, _frame: FrameType | None) -> None:
        raise _Signalled(number)

    ending = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)


def _open_streams() -> None:
    """Have somewhere to write where standard output or error is closed (``nopin serve >&-``): nobody wants it."""
    fill_standard_streams()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  it is open for as long as we are
    sys.stderr = sys.stderr or sys.stdout


def _silence_stdout() -> None:
    """Point standard output nowhere, so that the interpreter's last flush cannot complain again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
