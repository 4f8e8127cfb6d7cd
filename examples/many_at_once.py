"""Many reads in flight, awaited together: python many_at_once.py URL (of a two-dimensional array)."""

import asyncio
import sys

import nopin


async def main(url: str) -> None:
    """Read every row on its own, all at once, and add them up."""
    with nopin.attach(url) as remote:

        async def total(row: int) -> float:
            values = await remote.read_async(row)
            return float(values.sum())

        print("the sum is", sum(await asyncio.gather(*(total(row) for row in range(len(remote))))))


asyncio.run(main(sys.argv[1]))
