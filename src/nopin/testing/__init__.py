"""Testing tools: address spaces and NIC pairs without a kernel, a network or a clock."""
