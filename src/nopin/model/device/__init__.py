"""Devices of the modelled machine: real mirrors over modelled processes, and what moves bytes through them."""
