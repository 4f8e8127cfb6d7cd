"""Links that carry packet batches: UDP, raw receive, and middleware around any of them."""
