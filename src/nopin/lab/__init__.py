"""Measurements and demonstrations: what nopin does, beside what the machine can do without it."""
