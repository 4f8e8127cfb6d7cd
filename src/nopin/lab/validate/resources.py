"""What the procedures of experiments are made of."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from nopin.model.pool import Pool

__all__ = ["Pool", "Steps"]

Steps = Generator[Any, Any, Any]
