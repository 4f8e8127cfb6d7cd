"""Oracles: separate code that knows what programs may observe, and nothing of how the code under test works."""
