"""A client's protection domain, which may outlive its handle for a moment.

Queue pairs that answer attached peers live in the domain of the region's owner. When the owner lets go, they
stay a little, so that peers get exact errors instead of silence; the domain goes with the last of them.
"""

from __future__ import annotations

import errno

from nopin.nic.errors import VerbsError
from nopin.nic.mr import Pd
from nopin.nic.nic import Nic


class Domain:
    """A protection domain of the NIC and the count of responders in it.

    Attributes:
        pd: the NIC's object.
    """

    def __init__(self, nic: Nic) -> None:
        self._nic = nic
        self.pd: Pd = nic.alloc_pd()
        self._n_responders = 0
        self._closed = False

    def enter(self) -> None:
        """Count a responder in. Requires: to be called before its queue pair is made."""
        self._n_responders += 1

    def leave(self) -> None:
        """Count a responder out, after its queue pair is destroyed."""
        self._n_responders -= 1
        self._dealloc_if_unused()

    def close(self) -> None:
        """Give up the handle.

        Raises:
            VerbsError: EBUSY, the client still has regions or queue pairs in it.
        """
        n_own = self.pd.n_users - self._n_responders
        if n_own:
            raise VerbsError(f"the protection domain still has {n_own} regions or queue pairs", errno.EBUSY)
        self._closed = True
        self._dealloc_if_unused()

    def _dealloc_if_unused(self) -> None:
        if self._closed and not self._n_responders:
            self._nic.dealloc_pd(self.pd)
