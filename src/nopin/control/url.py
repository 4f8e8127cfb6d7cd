"""The URL of a share: ``nopin://HOST:PORT/SHARE#TOKEN``.

HOST:PORT is the TCP exchange of the owner's server. The token is a fragment, the part of a URL that programs
do not send along; whoever has it may use the share.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field

from nopin.errors import UsageError

TOKEN_BYTES = 32
FORM = "nopin://HOST:PORT/SHARE#TOKEN"

_URL = re.compile(r"nopin://(?P<place>[^/#]*)/(?P<share>[^#]*)#(?P<token>.*)", re.ASCII)
_PLACE = re.compile(r"(?:\[(?P<six>[0-9A-Za-z:.%_-]+)\]|(?P<host>[0-9A-Za-z._-]+)):(?P<port>\d{1,5})", re.ASCII)
_SHARE = re.compile(r"[0-9A-Za-z_-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ShareUrl:
    """A parsed share URL; `str` gives its text. The token is left out of `repr`, which ends up in logs.

    Attributes:
        host: an address or a name; IPv6 without its brackets.
        port: the TCP port of the exchange.
        share: the share's name.
        token: TOKEN_BYTES secret bytes.
    """

    host: str
    port: int
    share: str
    token: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> ShareUrl:
        """Read a URL.

        Raises:
            UsageError: the text is no share URL. The message names the wrong part, never the token.
        """
        url = _URL.fullmatch(text.strip())
        if url is None:
            raise UsageError(f"not a share URL; it looks like {FORM} (is the part from # on missing?)")
        place = _PLACE.fullmatch(url["place"])
        if place is None:
            raise UsageError(f"{url['place']!r} in a share URL is not HOST:PORT (IPv6 goes in brackets: [::1]:PORT)")
        port = int(place["port"])
        if not 0 < port < 65536:
            raise UsageError(f"port {port} in a share URL is not in 1 ... 65535")
        if not is_share_name(url["share"]):
            raise UsageError(f"{url['share']!r} in a share URL is not a share's name")
        return cls(host=place["six"] or place["host"], port=port, share=url["share"], token=_token(url["token"]))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        token = base64.urlsafe_b64encode(self.token).rstrip(b"=").decode()
        return f"nopin://{host}:{self.port}/{self.share}#{token}"


def is_share_name(text: str) -> bool:
    """Tell whether a share of this name can have a URL."""
    return _SHARE.fullmatch(text) is not None


def _token(text: str) -> bytes:
    try:
        token = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        token = b""
    if len(token) != TOKEN_BYTES:
        raise UsageError("the token (after #) of a share URL is damaged; copy the whole URL")
    return token
