"""RoCEv2 on the wire: codecs for headers, packet sequence numbers, ICRC, addresses.

Two forms of each header: a small record with `parse` and `emit` for one packet, and functions over whole
batches that cost a few numpy operations whatever the number of packets.
"""
