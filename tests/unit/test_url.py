"""Share URLs."""

from __future__ import annotations

import pytest

from nopin.control.url import ShareUrl
from nopin.errors import UsageError

TOKEN = bytes(range(224, 256))
TEXT = "nopin://127.0.0.1:4792/abc-_9#4OHi4-Tl5ufo6err7O3u7_Dx8vP09fb3-Pn6-_z9_v8"


def test_a_url_is_read_and_written() -> None:
    url = ShareUrl.parse(TEXT)
    assert url == ShareUrl("127.0.0.1", 4792, "abc-_9", TOKEN)
    assert str(url) == TEXT


@pytest.mark.parametrize("host", ["::1", "fe80::1%eth0", "example.org", "10.0.0.1", "2001:db8::7"])
def test_every_kind_of_host_survives(host: str) -> None:
    url = ShareUrl(host, 65535, "s", TOKEN)
    assert ShareUrl.parse(str(url)) == url


def test_ipv6_is_written_in_brackets() -> None:
    assert str(ShareUrl("::1", 1, "s", TOKEN)).startswith("nopin://[::1]:1/s#")


def test_space_around_a_pasted_url_does_not_matter() -> None:
    assert ShareUrl.parse(f"  {TEXT}\n").share == "abc-_9"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "looks like"),
        ("http://127.0.0.1:1/s#" + TEXT.partition("#")[2], "looks like"),
        (TEXT.partition("#")[0], "is the part from # on missing"),
        (TEXT.replace("4792", "0"), "port 0"),
        (TEXT.replace("4792", "65536"), "port 65536"),
        (TEXT.replace(":4792", ""), "not HOST:PORT"),
        (TEXT.replace("127.0.0.1", "::1"), "brackets"),
        (TEXT.replace("127.0.0.1", "a b"), "not HOST:PORT"),
        (TEXT.replace("4792", "४७९२"), "looks like|not HOST:PORT"),
        (TEXT.replace("abc-_9", ""), "not a share's name"),
        (TEXT.replace("abc-_9", "a/../b"), "not a share's name"),
        (TEXT.replace("abc-_9", "x" * 65), "not a share's name"),
        (TEXT[:-1], "damaged"),
        (TEXT + "AAAA", "damaged"),
        (TEXT[:-2] + "!!", "damaged"),
        (TEXT[:-2] + "é8", "damaged"),
    ],
)
def test_a_wrong_url_is_explained(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ShareUrl.parse(text)


def test_neither_repr_nor_an_error_shows_the_token() -> None:
    secret = TEXT.partition("#")[2]
    assert secret not in repr(ShareUrl.parse(TEXT))
    with pytest.raises(UsageError) as caught:
        ShareUrl.parse(TEXT.replace("4792", "x"))
    assert secret not in str(caught.value)
