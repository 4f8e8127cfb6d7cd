"""GIDs and addresses."""

from __future__ import annotations

import pytest

from nopin.nic.wire.gid import address_of, gid_of, is_ipv4


@pytest.mark.parametrize(
    ("address", "gid", "ipv4"),
    [
        ("192.0.2.1", "00000000000000000000ffffc0000201", True),
        ("2001:db8::7", "20010db8000000000000000000000007", False),
        ("::1", "00000000000000000000000000000001", False),
    ],
)
def test_address_and_gid_stand_for_each_other(address: str, gid: str, ipv4: bool) -> None:
    assert gid_of(address).hex() == gid
    assert address_of(bytes.fromhex(gid)) == address
    assert is_ipv4(bytes.fromhex(gid)) is ipv4


def test_mapped_text_is_the_ipv4_address() -> None:
    assert gid_of("::ffff:192.0.2.1") == gid_of("192.0.2.1")


def test_scope_is_not_part_of_a_gid() -> None:
    assert gid_of("fe80::1%eth0") == gid_of("fe80::1")


@pytest.mark.parametrize("text", ["", "localhost", "1.2.3", "1.2.3.4:5"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="does not appear to be an IPv4 or IPv6 address"):
        gid_of(text)


def test_gid_of_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes, not 4"):
        address_of(bytes(4))
