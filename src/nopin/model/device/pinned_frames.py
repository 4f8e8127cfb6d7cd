"""Pinned pages of a modelled process as the real `PinnedSpace` reaches them: frames held since registration."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from nopin.model.device.observer import DeviceObserver
from nopin.model.host.pins import Pin
from nopin.units import PAGE_BYTES, PAGE_MASK, PAGE_SHIFT


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
        for va, frame, n in self._pieces(address, length):
            data = process.host.frames.read(frame, va & PAGE_MASK, n)
            ctypes.memmove(local, data, n)
            self._observer.device_read(self._device, process, va, frame, data)
            local += n
        return length

    def store(self, address: int, length: int, local: int) -> int:
        """Copy from our address `local` to frames."""
        process = self._pin.process
        for va, frame, n in self._pieces(address, length):
            data = ctypes.string_at(local, n)
            process.host.frames.write(frame, va & PAGE_MASK, data)
            self._observer.device_wrote(self._device, process, va, frame, data)
            local += n
        return length

    def alive(self) -> bool:
        """False once the process has exited."""
        return self._pin.process.alive

    def close(self) -> None:
        """Unpin."""
        self._pin.process.unpin(self._pin)

    def _pieces(self, va: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Cut bytes at pages: (address, frame, length)."""
        while length > 0:
            n = min(length, PAGE_BYTES - (va & PAGE_MASK))
            yield va, self._pin.frame(va >> PAGE_SHIFT), n
            va, length = va + n, length - n
