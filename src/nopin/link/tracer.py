"""One line per packet, as it passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from nopin.link.base import Link, packets_of
from nopin.link.describe import describe
from nopin.link.wrapper import Wrapper
from nopin.mm.space import Bytes
from nopin.nic.wire.batch import Endpoint, PacketBatch, Path, TxBatch
from nopin.nic.wire.gid import address_of
from nopin.nic.wire.icrc import verify
from nopin.units import S_NS


class TracerLink(Wrapper):
    """Writes a line for each packet: seconds, direction (``>`` sent, ``<`` received), other end, contents.

    A packet whose ICRC is wrong is marked ``bad-icrc``.

    Args:
        inner: the link to watch.
        write: called with each line, without line end.
    """

    def __init__(self, inner: Link, write: Callable[[str], None]) -> None:
        super().__init__(inner)
        self._write = write

    def send(self, batch: TxBatch, now: int) -> None:
        """Trace, then send."""
        spans = list(packets_of(batch.segments))
        outward = Path(batch.path.remote, batch.path.local)  # `verify` takes the receiver's view
        self._trace(now, ">", batch.path.remote, batch.staging.array, spans, outward)
        self.inner.send(batch, now)

    def receive(self, now: int) -> Iterator[PacketBatch]:
        """Trace what arrives, on its way up."""
        for batch in self.inner.receive(now):
            spans = list(zip(batch.offsets.tolist(), batch.lengths.tolist(), strict=True))
            # Where the link has checked against a header we do not see, we cannot check again.
            path = None if batch.icrc_checked else batch.path
            self._trace(now, "<", batch.path.remote, batch.buffer, spans, path)
            yield batch

    def _trace(
        self,
        now: int,
        direction: str,
        other: Endpoint,
        buffer: Bytes,
        spans: list[tuple[int, int]],
        path: Path | None,
    ) -> None:
        if not spans:
            return
        places = np.array(spans, np.int64)
        good = [True] * len(spans) if path is None else verify(buffer, places[:, 0], places[:, 1], path).tolist()
        head = f"{now / S_NS:.6f} {direction} {address_of(other.gid)}:{other.port}"
        view = buffer.data
        for (offset, length), is_good in zip(spans, good, strict=True):
            tail = "" if is_good else " bad-icrc"
            self._write(f"{head} {describe(view[offset : offset + length])}{tail}")
