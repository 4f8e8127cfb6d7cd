"""Pinned pages of a modelled process as the real `PinnedSpace` reaches them: frames held since registration."""

from __future__ import annotations

import ctypes

from nopin.model.device.observer import DeviceObserver
from nopin.model.host.access import pieces
from nopin.model.host.pins import Pin
from nopin.units import PAGE_SHIFT


class PinnedFrames:
    """A `FramePort` over a pin; `close` lets go of the pages.

    Args:
        device: by name, for the observer.
    """

    def __init__(self, pin: Pin, device: str, observer: DeviceObserver) -> None:
        self._pin = pin
        self._device = device
        self._observer = observer

    def load(self, address: int, length: int, local: int) -> int:
        """Copy frames to our address `local`."""
        process = self._pin.process
        for page, at, n in pieces(address, length):
            frame = self._pin.frame(page)
            data = process.host.frames.read(frame, at, n)
            ctypes.memmove(local, data, n)
            self._observer.device_read(self._device, process, (page << PAGE_SHIFT) + at, frame, data)
            local += n
        return length

    def store(self, address: int, length: int, local: int) -> int:
        """Copy from our address `local` to frames."""
        process = self._pin.process
        for page, at, n in pieces(address, length):
            frame = self._pin.frame(page)
            data = ctypes.string_at(local, n)
            process.host.frames.write(frame, at, data)
            self._observer.device_wrote(self._device, process, (page << PAGE_SHIFT) + at, frame, data)
            local += n
        return length

    def alive(self) -> bool:
        """False once the process has exited."""
        return self._pin.process.alive

    def close(self) -> None:
        """Unpin."""
        self._pin.process.unpin(self._pin)
