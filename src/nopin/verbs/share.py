"""Shares: memory that peers attach to by a URL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopin.control.dtypes import parse_dtype
from nopin.control.messages import Publish, Published, ReclaimedShare, Withdraw
from nopin.control.url import ShareUrl
from nopin.errors import ServerGone
from nopin.verbs.buffers import Memory
from nopin.verbs.objects import LOST, DeviceObject
from nopin.verbs.prefetch import Prefetch, start_prefetch
from nopin.verbs.region import MemoryRegion

if TYPE_CHECKING:
    from nopin.verbs.device import Device
    from nopin.verbs.pd import ProtectionDomain
    from nopin.verbs.session import Session


class Share(DeviceObject):
    """Published memory of this process. It stays shared until closed, or until the device is.

    Attributes:
        region: the memory region behind it.
    """

    def __init__(self, device: Device, region: MemoryRegion, memory: Memory) -> None:
        request = Publish(
            seq=0,
            mr=region.handle,
            dtype=memory.dtype,
            shape=list(memory.shape),
            strides=list(memory.strides),
            offset=memory.offset,
        )
        self.session = region.session
        published, _ = self.session.request(request, Published)
        self.device = device
        self._first = memory.address + memory.offset
        self._shape, self._strides = memory.shape, memory.strides
        self._itemsize = parse_dtype(memory.dtype).itemsize
        self.region = region
        self.name = published.share
        self._token = published.token
        super().__init__(region)
        device._hold(self)

    def _described(self) -> str:
        return f"{self.name} of {self.region!r}"

    def _instead(self) -> str:
        return "; pass on its url, and attach to that"

    @property
    def url(self) -> str:
        """Whoever has it may attach, with the share's rights. It holds a secret.

        A server that takes over is found at the same place, so it stays the same.
        """
        welcome = self.session.welcome
        host, port = welcome.exchange_host, welcome.exchange_port
        return str(ShareUrl(host=host, port=port, share=self.name, token=self._token))

    def prefetch(self, key: object = ..., *, write: bool = False) -> Prefetch:
        """Start making what `key` selects of the shared array resident, so that peers find it.

        Returns and raises as `Device.prefetch`.
        """
        self._require_open()
        return start_prefetch(self.device, key, self._first, self._shape, self._strides, self._itemsize, write=write)

    def close(self) -> None:
        """Withdraw it: attached peers get access errors and are told. Its memory may be freed afterwards."""
        super().close()
        self.device._release(self)
        self.region.close()

    def _end(self) -> None:
        """Withdraw it. Where there is no server, see to it that no other publishes it."""
        try:
            self.session.tell(Withdraw(seq=0, share=self.name))
        except ServerGone:
            if self.session is self.device.lifeline.current:
                self.session.strike(self.name)
                self.device.lifeline.look_for_successor()  # that may have read the book just before

    def _lose(self) -> None:
        """Be closed, and the region with it: the server has ended, and its successor does not publish this."""
        for each in (self, self.region):
            each._why_closed = LOST
            each._let_go()
            self.device._release(each)

    def _resume(self, session: Session, pd: ProtectionDomain, told: ReclaimedShare) -> None:
        """Go on with a new server."""
        self.session = session
        self.region._resume(pd, told)
