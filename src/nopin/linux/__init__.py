"""Linux kernel interfaces through ctypes: mechanism only, one file per interface."""
