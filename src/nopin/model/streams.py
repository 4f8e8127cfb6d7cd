"""Named streams of randomness: what one part draws never changes what another part is given.

Each stream is seeded by a stable digest of (seed of the run, name), never by Python's own `hash`, which differs from
process to process. A draw that is added in one part therefore leaves the others' untouched, and a run can be told by
its seed alone.
"""

from __future__ import annotations

import hashlib
from random import Random


class Streams:
    """See above.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._streams: dict[str, Random] = {}

    def __getitem__(self, name: str) -> Random:
        """Return the stream of that name: the same one each time."""
        stream = self._streams.get(name)
        if stream is None:
            digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
            stream = self._streams[name] = Random(int.from_bytes(digest, "little"))
        return stream
