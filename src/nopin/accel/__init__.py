"""The accelerator: processes that compute on arenas, at the addresses their owner uses.

A worker maps every arena of its owner where the owner has it, and opens a userfaultfd of its own over it. So a pointer
means the same on both sides, the worker's page table is a secondary page table kept by the kernel, and a page the
worker misses is a device fault that the device server resolves. The server never speaks with a worker: it holds the
worker's userfaultfd and a pidfd, serves its faults, fences it at invalidations, and believes nothing it says.

    memory.py     which addresses are arenas; arrays by reference
    arguments.py  arguments and results as bytes
    messages.py   what owner and worker say to each other
    kernels.py    fill copy sum add scale gather, in chunks; chase, over pointers
    worker.py     the worker process
    job.py        one job, as its owner sees it
    queue.py      jobs that wait, first come first served
    process.py    the owner's handle on a worker process
    lane.py       the thread that keeps one worker at work
"""
