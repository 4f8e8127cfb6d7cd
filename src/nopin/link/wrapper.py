"""The base of middleware: a link around a link that changes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from nopin.link.base import Link
from nopin.nic.wire.batch import PacketBatch, TxBatch


class Wrapper:
    """Passes everything through; middleware overrides what it touches.

    Attributes:
        inner: the wrapped link.
    """

    def __init__(self, inner: Link) -> None:
        self.inner = inner
        self.endpoint = inner.endpoint
        self.mtu = inner.mtu

    def send(self, batch: TxBatch, now: int) -> None:
        """See `Link`."""
        self.inner.send(batch, now)

    def receive(self, now: int) -> Iterable[PacketBatch]:
        """See `Link`."""
        return self.inner.receive(now)

    def filenos(self) -> list[int]:
        """See `Link`."""
        return self.inner.filenos()

    def next_deadline(self) -> int | None:
        """See `Link`."""
        return self.inner.next_deadline()

    def close(self) -> None:
        """See `Link`."""
        self.inner.close()

    def statistics(self) -> dict[str, int]:
        """See `Link`."""
        return self.inner.statistics()
