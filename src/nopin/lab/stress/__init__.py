"""Everybody at once on one arena of managed memory, and a checker that knows what each read may return.

log.py       the checker: what every writer has begun and has done, outside of the arena; judges what was read
actor.py     somebody who reads and writes, whatever the way: by CPU, by RDMA, by an accelerator
giver.py     a process that gives pages of its own up
owner.py     the owner: its forked writers, its accelerator, and all that it does to its memory
peer.py      a peer, on the wire or direct, that attaches again when servers die
run.py       servers, kills, and the result
"""
