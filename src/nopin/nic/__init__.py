"""The NIC as a state machine without I/O: queue pairs, regions, completion queues, RoCEv2 transport."""
