"""Exit codes of the command line; 0 is done."""

from __future__ import annotations

FAILED = 1
"""Something went wrong, or a check did not hold."""
USAGE = 2
HOST_LACKS = 3
"""This host does not allow what was asked for."""
COUNTER_EXAMPLE = 4
"""A property broke, and how is written down."""
SIGNALLED = 128
"""Plus the number of the signal that ended the command: 130 for Ctrl-C, 143 for SIGTERM."""
INTERRUPTED = 130
BROKEN_PIPE = 141
"""The reader of our output went away."""
