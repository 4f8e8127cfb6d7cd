"""The modelled machine: virtual time, modelled memory and links, and the same deciding code that runs live."""

from nopin.model.machine import Machine

__all__ = ["Machine"]
