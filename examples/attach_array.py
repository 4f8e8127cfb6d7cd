"""Read and write another process's array: python attach_array.py URL."""

import sys

import nopin

with nopin.attach(sys.argv[1]) as remote:
    print("attached to", remote)
    remote[10:20, ::2] = 1.0
    print("row 10 begins", remote[10, :6])
