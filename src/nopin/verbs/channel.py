"""Completion channels: where a thread sleeps until an armed completion queue has something."""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

from nopin.control.messages import NOTICES, CreateChannel, DestroyChannel, Handle
from nopin.errors import ServerGone
from nopin.pending import checked_timeout
from nopin.verbs.objects import DeviceObject

if TYPE_CHECKING:
    from nopin.verbs.device import Device


class CompletionChannel(DeviceObject):
    """A pipe that becomes readable when one of its armed completion queues gets a completion.

    One thread waits on a channel; threads that wait for different queues take a channel each.
    """

    def __init__(self, device: Device) -> None:
        self.session = device.session
        reply, (fd,) = self.session.request(CreateChannel(seq=0), Handle)
        os.set_blocking(fd, False)
        self.device = device
        self.handle = reply.handle
        self._fd = fd
        super().__init__(device)

    def fileno(self) -> int:
        """Return the descriptor, for poll, select or asyncio; -1 once closed."""
        return self._fd

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until an armed queue fired, at most `timeout` seconds; False when it did not.

        Raises:
            ServerGone: the server went away.
            UsageError: `timeout` is no number.
        """
        self._require_open()
        timeout = checked_timeout(timeout)
        waiter = select.poll()
        waiter.register(self._fd, select.POLLIN)
        if not waiter.poll(None if timeout is None else timeout * 1000):
            return False
        try:
            notices = os.read(self._fd, NOTICES)
        except BlockingIOError:
            return False
        if not notices:
            raise ServerGone("the device server of this channel went away; make a new channel")
        return True

    def _described(self) -> str:
        return str(self.handle)

    def _end(self) -> None:
        self.session.tell(DestroyChannel(seq=0, channel=self.handle))

    def _let_go(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)
