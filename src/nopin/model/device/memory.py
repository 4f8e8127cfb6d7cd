"""The memory of a modelled process as an arena of a device: all its addresses, with frames wherever they are.

The real Iommu reaches an arena through its mirror and through `DeviceArena.memory`, which on a live machine is one
mapping of a file. Here it is this: bytes by virtual address, each page looked up in what the last fill took down.
"""

from __future__ import annotations

from nopin.model.device.observer import DeviceObserver
from nopin.model.device.translations import Translations
from nopin.model.host.process import Process
from nopin.units import PAGE_MASK, PAGE_SHIFT

ADDRESS_BYTES = 1 << 47
"""User space of x86-64."""


class MirroredMemory:
    """See above; implements `mm.space.ByteMemory`, and is its own view.

    Args:
        device: by name, for the observer.
    """

    def __init__(self, process: Process, device: str, translations: Translations, observer: DeviceObserver) -> None:
        self.view = self
        self._process = process
        self._device = device
        self._translations = translations
        self._observer = observer

    def __len__(self) -> int:
        return ADDRESS_BYTES

    def __getitem__(self, where: slice, /) -> bytes:
        """Read [start, stop)."""
        frames, start, length = self._translations.frames, where.start, where.stop - where.start
        if (start & PAGE_MASK) + length <= PAGE_MASK + 1:
            frame = self._translations.frame(start >> PAGE_SHIFT)
            data = frames.read(frame, start & PAGE_MASK, length)
            self._observer.device_read(self._device, self._process, start, frame, data)
            return data
        parts = []
        for va, frame, at, _, n in self._translations.pieces(start, length):
            parts.append(frames.read(frame, at, n))
            self._observer.device_read(self._device, self._process, va, frame, parts[-1])
        return b"".join(parts)

    def __setitem__(self, where: slice, data: bytes | memoryview, /) -> None:
        """Write [start, stop)."""
        for va, frame, at, offset, n in self._translations.pieces(where.start, where.stop - where.start):
            part = bytes(data[offset : offset + n])
            self._translations.frames.write(frame, at, part)
            self._observer.device_wrote(self._device, self._process, va, frame, part)
