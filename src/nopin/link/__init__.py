"""Links carry packets between the NIC and outside: UDP, raw sockets, memory, and middleware around them."""
