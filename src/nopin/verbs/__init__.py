"""The client library: verbs objects over shared rings, and remote arrays on top of them."""

from nopin.accel.job import Job
from nopin.accel.tally import AcceleratorStatistics
from nopin.nic.abi import (
    Access,
    AsyncEventType,
    Discipline,
    QpState,
    SendFlags,
    WcFlags,
    WcOpcode,
    WcStatus,
    WrOpcode,
)
from nopin.nic.attributes import AddressVector, QpAttr, QpCaps
from nopin.verbs.accelerator import Accelerator
from nopin.verbs.arena import Arena
from nopin.verbs.attach import attach
from nopin.verbs.channel import CompletionChannel
from nopin.verbs.cq import CompletionQueue
from nopin.verbs.device import Device, DeviceInfo, numpy_memory
from nopin.verbs.events import AsyncEvent
from nopin.verbs.operation import Operation
from nopin.verbs.pd import ProtectionDomain
from nopin.verbs.prefetch import Prefetch
from nopin.verbs.qp import QpEndpoint, QueuePair
from nopin.verbs.region import MemoryRegion
from nopin.verbs.remote import RemoteArray
from nopin.verbs.share import Share
from nopin.verbs.wr import RecvWr, SendWr, Sge, Wc

__all__ = [
    "Accelerator",
    "AcceleratorStatistics",
    "Access",
    "AddressVector",
    "Arena",
    "AsyncEvent",
    "AsyncEventType",
    "CompletionChannel",
    "CompletionQueue",
    "Device",
    "DeviceInfo",
    "Discipline",
    "Job",
    "MemoryRegion",
    "Operation",
    "Prefetch",
    "ProtectionDomain",
    "QpAttr",
    "QpCaps",
    "QpEndpoint",
    "QpState",
    "QueuePair",
    "RecvWr",
    "RemoteArray",
    "SendFlags",
    "SendWr",
    "Sge",
    "Share",
    "Wc",
    "WcFlags",
    "WcOpcode",
    "WcStatus",
    "WrOpcode",
    "attach",
    "numpy_memory",
]
