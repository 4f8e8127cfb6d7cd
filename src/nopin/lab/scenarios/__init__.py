"""Comparisons that users ask for, as functions over the modelled machine."""
