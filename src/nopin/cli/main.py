"""The ``nopin`` command: which subcommands there are, and how every one of them ends.

Exit codes: 0 done, 1 something failed or a check did not hold, 2 wrong usage, 3 this host lacks a feature,
4 a counter-example was found,
130 interrupted, 141 the reader of our output went away.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

import click

from nopin import errors
from nopin.cli.output import say

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_HOST_LACKS = 3
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

COMMANDS = (
    "demo",
    "share",
    "get",
    "bench",
    "stress",
    "stat",
    "top",
    "doctor",
    "serve",
    "model",
    "validate",
    "explore",
    "replay",
)
"""Each is the function `command` of the module of that name in nopin.cli, most useful first."""


class _Commands(click.Group):
    """Loads a subcommand's module only when it is asked for, so that each starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

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
    try:
        result = cli.main(args=argv, prog_name="nopin", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.ClickException as wrong:
        wrong.show()
        return wrong.exit_code
    except errors.UsageError as wrong:
        say(f"nopin: {wrong}")
        return EXIT_USAGE
    except errors.HostLacks as lacking:
        say(f"nopin: {lacking}")
        return EXIT_HOST_LACKS
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_BROKEN_PIPE
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except (errors.NopinError, OSError) as failed:
        say(f"nopin: {failed}")
        return EXIT_FAILED
    return result if isinstance(result, int) else 0


def _silence_stdout() -> None:
    """Point standard output nowhere, so that the interpreter's last flush cannot complain again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
