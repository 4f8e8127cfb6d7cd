"""Completion queues: completions are polled from memory, and waited for on a channel."""

from __future__ import annotations

import operator
import os
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nopin.control.messages import CreateCq, DestroyCq, Handle
from nopin.errors import UsageError
from nopin.linux import memfd
from nopin.linux.fence import fence
from nopin.nic.rings import CompletionConsumer
from nopin.verbs.channel import CompletionChannel
from nopin.verbs.objects import DeviceObject
from nopin.verbs.waiting import SPIN_US, Waiter, deadline_after
from nopin.verbs.wr import Wc, decode_completion

if TYPE_CHECKING:
    from nopin.verbs.device import Device


class CompletionQueue(DeviceObject):
    """A completion queue.

    Args:
        depth: completions it holds; rounded up to a power of two. Completions beyond it are lost.
        channel: where `wait` sleeps; without one the queue makes its own.
        spin_us: how long `wait` looks at memory before it sleeps.
    """

    def __init__(
        self, device: Device, depth: int, channel: CompletionChannel | None = None, *, spin_us: int = SPIN_US
    ) -> None:
        self.device = device
        self.depth = 1 << (_checked_depth(depth) - 1).bit_length()
        self._owns_channel = channel is None
        self.channel = CompletionChannel(device) if channel is None else channel
        self.channel._require_open()
        if self.channel.device is not device:
            raise UsageError("the completion channel is of another Device; make it on the same")
        self.session = self.channel.session
        request = CreateCq(seq=0, depth=self.depth, channel=self.channel.handle)
        reply, (fd,) = self.session.request(request, Handle)
        self.handle = reply.handle
        try:
            self.ring = CompletionConsumer(memfd.map_array(fd), self.depth, fence)
            self.waiter = Waiter(self.ring, self.channel.fileno(), self.session.control, spin_us)
        except BaseException:  # this process is out of memory or descriptors
            self.session.tell(DestroyCq(seq=0, cq=self.handle))
            raise
        finally:
            os.close(fd)
        super().__init__(device, self.channel)

    def poll(self, n: int = 16) -> list[Wc]:
        """Take up to n completions, oldest first; empty when there is none."""
        if self._why_closed:
            raise self._closed_error()
        found: list[Wc] = []
        poll_one = self.ring.poll_one
        while len(found) < n and (entry := poll_one()) is not None:
            found.append(decode_completion(entry))
        return found

    def poll_array(self, n: int) -> NDArray[np.void]:
        """Take up to n completions as an array of nic.abi.CQE_DTYPE: for many at once."""
        if self._why_closed:
            raise self._closed_error()
        return self.ring.poll(n)

    def wait(self, n: int = 1, timeout: float | None = None) -> list[Wc]:
        """Take n completions, waiting for them; fewer when `timeout` seconds pass first.

        Raises:
            ServerGone: the server went away.
        """
        deadline_ns = deadline_after(timeout)
        found = self.poll(n)
        while len(found) < n and self.waiter.wait(deadline_ns, until=self._is_closed):
            found += self.poll(n - len(found))
        return found

    def arm(self, *, solicited_only: bool = False) -> None:
        """Ask the channel to fire at the next completion; poll once more before sleeping."""
        self._require_open()
        self.ring.arm(solicited_only=solicited_only)

    def close(self) -> None:
        """Close the queue, its queue pairs first, and the channel if it made that itself."""
        if self._why_closed:
            return
        super().close()
        if self._owns_channel:
            self.channel.close()

    def _is_closed(self) -> bool:
        return bool(self._why_closed)

    def _described(self) -> str:
        return f"{self.handle} of {self.depth} entries"

    def _end(self) -> None:
        self.waiter.wake()
        self.session.tell(DestroyCq(seq=0, cq=self.handle))

    def _let_go(self) -> None:
        self.waiter.close()


def _checked_depth(depth: int) -> int:
    try:
        number = operator.index(depth)
    except TypeError:
        number = 0
    if number < 1:
        raise UsageError(f"a completion queue of depth {depth!r}: give an integer from 1 on")
    return number
