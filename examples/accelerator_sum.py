"""Compute on an array four times larger than the memory it may take, in another process, without copying it."""

import numpy as np

import nopin

with nopin.Device(budget="32MiB") as device:
    numbers = device.empty(1 << 24, np.float64)  # 128 MiB
    accelerator = device.accelerator(workers=2)
    accelerator.launch("fill", numbers, 0.5).result()
    jobs = [accelerator.launch("sum", half) for half in np.split(numbers, 2)]
    print("The sum is", sum(job.result() for job in jobs))
    for usage in (job.usage for job in jobs if job.usage is not None):
        print(f"{usage.n_faults} page faults in {usage.run_ns / 1e6:.0f} ms")
