"""Share a numpy array with other processes, in place: run this, then attach_array.py with the URL it prints."""

import numpy as np

import nopin

numbers = np.zeros((1000, 1000))
with nopin.Device() as device, device.share(numbers, access="rw") as share:
    print(share.url, flush=True)
    input("Press Enter to stop sharing. ")
print("The sum is now", numbers.sum())
