"""RoCEv2 bytes: opcodes, headers, packet batches and the invariant CRC."""
