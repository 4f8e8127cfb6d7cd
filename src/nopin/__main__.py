"""``python -m nopin`` is the command line."""

from __future__ import annotations

import sys

from nopin.cli.main import main

sys.exit(main())
