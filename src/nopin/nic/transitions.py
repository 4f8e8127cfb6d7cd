"""The state machine of an RC queue pair: which change needs and allows which attributes.

Source: IBTA volume 1, section 11.2.5.2 and ``ib_modify_qp_is_ok`` of the Linux RDMA core. Alternate paths do not
exist on RoCE and are refused by having no attribute.
"""

from __future__ import annotations

from dataclasses import fields

from nopin.nic.abi import Access, QpState
from nopin.nic.attributes import RD_ATOMIC_MAX, QpAttr
from nopin.nic.errors import VerbsError
from nopin.nic.wire.psn import PSN_MASK

_R, _I, _TR, _TS, _D, _E = (
    QpState.RESET,
    QpState.INIT,
    QpState.RTR,
    QpState.RTS,
    QpState.SQD,
    QpState.ERR,
)

_INIT = frozenset({"pkey_index", "port_num", "access"})
_RTR = frozenset({"av", "path_mtu", "dest_qpn", "rq_psn", "max_dest_rd_atomic", "min_rnr_timer"})
_RTS = frozenset({"timeout", "retry_cnt", "rnr_retry", "sq_psn", "max_rd_atomic"})
_NONE: frozenset[str] = frozenset()
_RUNNING = frozenset({"cur_state", "access", "min_rnr_timer"})

_ALLOWED: dict[tuple[QpState, QpState], tuple[frozenset[str], frozenset[str]]] = {
    (_R, _I): (_INIT, _NONE),
    (_I, _I): (_NONE, _INIT),
    (_I, _TR): (_RTR, frozenset({"access", "pkey_index"})),
    (_TR, _TS): (_RTS, _RUNNING),
    (_TS, _TS): (_NONE, _RUNNING),
    (_TS, _D): (_NONE, _NONE),
    (_D, _D): (
        _NONE,
        frozenset(
            {
                "port_num",
                "av",
                "timeout",
                "retry_cnt",
                "rnr_retry",
                "max_rd_atomic",
                "max_dest_rd_atomic",
                "access",
                "pkey_index",
                "min_rnr_timer",
            }
        ),
    ),
    (_D, _TS): (_NONE, _RUNNING),
}
"""(from, to) -> (required, optional). RESET and ERR are reached from anywhere and take no attributes."""

_LIMITS = {
    "pkey_index": 0,
    "port_num": 1,
    "dest_qpn": 0xFFFFFF,
    "max_rd_atomic": RD_ATOMIC_MAX,
    "max_dest_rd_atomic": RD_ATOMIC_MAX,
    "min_rnr_timer": 31,
    "timeout": 31,
    "retry_cnt": 7,
    "rnr_retry": 7,
}
_MTUS = frozenset({256, 512, 1024, 2048, 4096})
_CURRENT = frozenset({_TR, _TS, _D})
_RIGHTS = Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ | Access.REMOTE_ATOMIC
_PSNS = ("rq_psn", "sq_psn")


def given(attr: QpAttr) -> set[str]:
    """Name the attributes that are in the mask, `state` left out."""
    return {f.name for f in fields(attr) if f.name != "state" and getattr(attr, f.name) is not None}


def check_transition(current: QpState, attr: QpAttr) -> QpState:
    """Return the new state if the change is legal.

    Raises:
        VerbsError: EINVAL; the message names the attribute or the states.
    """
    target = _target(current, attr)
    names = given(attr)
    if "cur_state" in names:
        _check_current(current, attr)
    if target in (QpState.RESET, QpState.ERR):
        _refuse_extra(current, target, names)
        if target is QpState.ERR and current is QpState.RESET:
            raise VerbsError("a queue pair in RESET cannot go to ERR")
        return target
    rule = _ALLOWED.get((current, target))
    if rule is None:
        raise VerbsError(f"a queue pair cannot go from {current.name} to {target.name}")
    required, optional = rule
    missing = sorted(required - names)
    if missing:
        raise VerbsError(f"{current.name} to {target.name} needs {', '.join(missing)}")
    _refuse_extra(current, target, names - required - optional)
    _check_values(attr, names)
    return target


def _target(current: QpState, attr: QpAttr) -> QpState:
    if attr.state is None:
        return current
    try:
        return QpState(attr.state)
    except ValueError:
        raise VerbsError(f"{attr.state} is no queue pair state") from None


def _check_current(current: QpState, attr: QpAttr) -> None:
    if attr.cur_state not in _CURRENT:
        raise VerbsError("cur_state may name only RTR, RTS or SQD")
    if attr.cur_state != current:
        raise VerbsError(f"cur_state says {QpState(attr.cur_state).name}, the queue pair is in {current.name}")


def _refuse_extra(current: QpState, target: QpState, extra: set[str]) -> None:
    if extra:
        raise VerbsError(f"{current.name} to {target.name} does not take {', '.join(sorted(extra))}")


def _check_values(attr: QpAttr, names: set[str]) -> None:
    for name in names & _LIMITS.keys():
        if not 0 <= getattr(attr, name) <= _LIMITS[name]:
            raise VerbsError(f"{name} {getattr(attr, name)} is outside 0 ... {_LIMITS[name]}")
    if "path_mtu" in names and attr.path_mtu not in _MTUS:
        raise VerbsError(f"path_mtu {attr.path_mtu} is not one of 256, 512, 1024, 2048, 4096")
    if attr.access is not None and attr.access & ~_RIGHTS:
        raise VerbsError(f"access {attr.access:#x} has unknown rights")
    if attr.av is not None and (len(attr.av.gid) != 16 or not 0 < attr.av.port < 65536):
        raise VerbsError("the address vector needs a 16-byte GID and a UDP port")
    if "dest_qpn" in names and not attr.dest_qpn:
        raise VerbsError("dest_qpn 0 is no queue pair")


def merge(into: QpAttr, attr: QpAttr) -> None:
    """Copy the given attributes; PSNs are cut to 24 bits."""
    for name in given(attr) - {"cur_state"}:
        value = getattr(attr, name)
        setattr(into, name, value & PSN_MASK if name in _PSNS else value)
