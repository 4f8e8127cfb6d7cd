"""The modelled Linux memory management: processes, page tables, frames that hold bytes, and every event they meet.

Mechanism and policy of one host, as procedures for the scheduler (`model/scheduler.py`). `host.py` says how the parts
fit, in which order locks are taken and when a frame may be used anew.
"""
