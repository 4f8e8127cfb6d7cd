"""Where the command line begins: ``nopin``, and ``python -m nopin``."""

from __future__ import annotations

import sys

from nopin.cli.exits import INTERRUPTED


def main() -> int:
    """Run the command line and return its exit code; Ctrl-C while it is still being imported is no traceback."""
    try:
        from nopin.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
