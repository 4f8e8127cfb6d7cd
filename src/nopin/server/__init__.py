"""The device server: one process, one epoll loop, the sans-IO NIC inside."""
