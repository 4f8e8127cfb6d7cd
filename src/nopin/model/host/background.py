"""Background reclaim: frames are freed before somebody has to wait for one.

When fewer than `low` frames are free a task begins, which reclaims until `high` are. Who allocates meanwhile takes what
there is, and reclaims for itself only where that is nothing. What comes to nothing (pages are on their way, say) is
tried again after a pause, and a few times in a row only.

Source: kswapd of Linux (balance_pgdat), with two watermarks of its three: what is below the lowest is direct reclaim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.mm.effects import Backoff
from nopin.model.effects import Procedure
from nopin.model.host import reclaim
from nopin.units import MS_NS

if TYPE_CHECKING:
    from nopin.model.host.host import Host


ATTEMPTS = 16
"""In a row that came to nothing (MAX_RECLAIM_RETRIES of Linux)."""
PAUSE_NS = MS_NS


class BackgroundReclaim:
    """See above.

    Attributes:
        low, high: free frames, at which it begins and ends.
    """

    def __init__(self, host: Host, low: int, high: int) -> None:
        self.low, self.high = low, high
        self._host = host
        self._is_running = False

    def look(self) -> None:
        """A frame was taken: begin, if few are left."""
        if not self._is_running and self._host.frames.n_free < self.low:
            self._is_running = True
            self._host.scheduler.spawn(f"{self._host.name} reclaims", self._run())

    def _run(self) -> Procedure[None]:
        frames, n_failed = self._host.frames, 0
        while frames.n_free < self.high and n_failed < ATTEMPTS:
            if (yield from reclaim.reclaim(self._host, self.high - frames.n_free)):
                n_failed = 0
            else:
                n_failed += 1
                yield Backoff(PAUSE_NS)
        self._is_running = False
