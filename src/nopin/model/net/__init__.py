"""Networks of the modelled machine: links, and hosts with the real NIC on them."""
