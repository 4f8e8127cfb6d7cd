"""The client library: verbs objects over shared rings, and remote arrays on top of them."""
