"""Share a process's ordinary memory with devices - RDMA NICs, accelerators, peers - without pinning it.

The client library behind these names, and numpy with it, is imported when one of them is first used: what needs only a
module below, as the command line that prints its help, starts without.
"""

from typing import TYPE_CHECKING

from nopin.errors import (
    AcceleratorError,
    ArenaFull,
    AttachRefused,
    Closed,
    HostLacks,
    JobCancelled,
    NopinError,
    OwnerGone,
    PageLost,
    PeerError,
    PrefetchFailed,
    QueueFull,
    RegionGone,
    ServerError,
    ServerGone,
    ServerRefused,
    UsageError,
    WorkerGone,
    WorkError,
)

if TYPE_CHECKING:
    from nopin.verbs import (
        Accelerator,
        AcceleratorStatistics,
        Access,
        AddressVector,
        Arena,
        AsyncEvent,
        AsyncEventType,
        CompletionChannel,
        CompletionQueue,
        Device,
        DeviceInfo,
        Discipline,
        Job,
        MemoryRegion,
        Operation,
        Prefetch,
        ProtectionDomain,
        QpAttr,
        QpCaps,
        QpEndpoint,
        QpState,
        QueuePair,
        RecvWr,
        RemoteArray,
        SendFlags,
        SendWr,
        Sge,
        Share,
        Wc,
        WcFlags,
        WcOpcode,
        WcStatus,
        WrOpcode,
        attach,
        numpy_memory,
    )

__version__ = "0.1.0"

__all__ = [
    "Accelerator",
    "AcceleratorError",
    "AcceleratorStatistics",
    "Access",
    "AddressVector",
    "Arena",
    "ArenaFull",
    "AsyncEvent",
    "AsyncEventType",
    "AttachRefused",
    "Closed",
    "CompletionChannel",
    "CompletionQueue",
    "Device",
    "DeviceInfo",
    "Discipline",
    "HostLacks",
    "Job",
    "JobCancelled",
    "MemoryRegion",
    "NopinError",
    "Operation",
    "OwnerGone",
    "PageLost",
    "PeerError",
    "Prefetch",
    "PrefetchFailed",
    "ProtectionDomain",
    "QpAttr",
    "QpCaps",
    "QpEndpoint",
    "QpState",
    "QueueFull",
    "QueuePair",
    "RecvWr",
    "RegionGone",
    "RemoteArray",
    "SendFlags",
    "SendWr",
    "ServerError",
    "ServerGone",
    "ServerRefused",
    "Sge",
    "Share",
    "UsageError",
    "Wc",
    "WcFlags",
    "WcOpcode",
    "WcStatus",
    "WorkError",
    "WorkerGone",
    "WrOpcode",
    "__version__",
    "attach",
    "numpy_memory",
]

if not TYPE_CHECKING:  # to a type checker every other name would exist, too

    def __getattr__(name: str) -> object:
        """Import the client library, for a public name that is not here yet (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module 'nopin' has no attribute {name!r}")
        from nopin import verbs

        globals().update((each, getattr(verbs, each)) for each in verbs.__all__)
        return globals()[name]

    def __dir__() -> list[str]:
        """Name what is public, imported yet or not."""
        return sorted({*globals(), *__all__})
