"""The modelled machine: virtual time, modelled memory and links, and the same deciding code that runs live."""
