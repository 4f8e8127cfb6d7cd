"""Managed memory modelled: the real pager over frames, page tables and a swap file of the model."""
