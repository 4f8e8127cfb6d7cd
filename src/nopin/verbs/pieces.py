"""A selection as one-sided requests: runs, long ones cut."""

from __future__ import annotations

import numpy as np

from nopin.nic.abi import WrOpcode
from nopin.verbs.selection import Selection
from nopin.verbs.transfer import Batch, Pieces

PIECE_BYTES = 1 << 26
"""Longest request. Below the 2 GiB of a message, so that other work comes in between and errors are near."""


def pieces_of(
    opcode: WrOpcode, selection: Selection, remote_base: int, local_base: int, piece_bytes: int = PIECE_BYTES
) -> Pieces:
    """Cut a non-empty selection into requests; run i lies at i * run_bytes of the local buffer.

    Args:
        remote_base: the peer's address of the array's first element.
        local_base: address of the local buffer.
        piece_bytes: longest request.
    """
    run_bytes = selection.run_bytes
    n_per_run = -(-run_bytes // piece_bytes)
    if selection.n_runs * n_per_run == 1:
        return Pieces(opcode, 1, None, (local_base, run_bytes, remote_base + selection.first_offset()))

    def cut(first: int, n: int) -> Batch:
        index = np.arange(first, first + n, dtype=np.int64)
        run, part = np.divmod(index, n_per_run)
        first_run = int(run[0])
        starts = selection.offsets(first_run, int(run[-1]) - first_run + 1)
        within = part * piece_bytes
        local = run * run_bytes + within
        remote = starts[run - first_run] + within
        return Batch(
            local.astype(np.uint64) + np.uint64(local_base),
            (remote + remote_base).astype(np.uint64),
            np.minimum(piece_bytes, run_bytes - within).astype(np.uint32),
        )

    return Pieces(opcode, selection.n_runs * n_per_run, cut)
