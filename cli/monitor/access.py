"""Access: who may see the page and who may ask the run for work.

A page of another site, opened in the same browser, must get nothing out of this one and nothing
into it: so the Host header must name this machine (else any name could be made to lead here), a
request must come from the page itself (Origin), and its token is in a header or a form, never in a
cookie. The cookie, which only opens the page, holds a hash of the token: other servers on this
machine, whatever their port, are shown it too.

What a request asks for is decided by its path alone (`scope["path"]`, which the routes go by too):
an address put together from its Host header could say something else.
"""

import hashlib
import hmac
import ipaddress
import re
import socket
from dataclasses import dataclass

from starlette.requests import Request

COOKIE = "mien-monitor"
HEADER = "x-mien-token"

# As many as a name of DNS has.
_MAX_HOST_LETTERS = 255
_HOST = re.compile(
    r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[0-9a-z._-]+))(?::\d{1,5})?", re.ASCII | re.IGNORECASE
)


@dataclass(frozen=True)
class Access:
    """The rules of one server.

    Args:
        host: What it listens on.
        token: The secret; None where nothing needs one.
        is_open: The page can be reached from other machines, so it needs the token.
        allows: Requests are taken, with the token.
    """

    host: str
    token: str | None
    is_open: bool
    allows: bool

    def knows_host(self, request: Request) -> bool:
        """True where the Host header names this machine: no rebound DNS name leads here."""
        headers = request.headers.getlist("host")
        # Of two headers nobody could say which one counts.
        if len(headers) != 1 or len(headers[0]) > _MAX_HOST_LETTERS:
            return False
        found = _HOST.fullmatch(headers[0])
        if found is None:
            return False
        name = (found["name"] or found["v6"]).lower()
        if name in ("localhost", self.host.lower()):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            own = socket.gethostname().lower()
            return self.is_open and name in (own, f"{own}.local", socket.getfqdn().lower())
        return self.is_open or address.is_loopback  # an address is no name that could be rebound

    def is_same_origin(self, request: Request) -> bool:
        """True where the request comes from the page itself, or from a program."""
        # Browsers say where a request comes from; a program, which no page can steer, says nothing.
        if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return False
        origin = request.headers.get("origin")
        own = f"{request.scope['scheme']}://{request.headers.get('host')}"
        return origin is None or origin == own

    def is_token(self, given: str | None) -> bool:
        """True for the token, in a time that tells nothing of it."""
        if self.token is None or given is None:
            return False
        # As bytes: of text it takes ASCII alone, and what is given may hold anything.
        return hmac.compare_digest(given.encode(), self.token.encode())

    def may_read(self, request: Request) -> bool:
        """True where the page and its figures may be shown."""
        if not self.is_open:
            return True
        cookie = request.cookies.get(COOKIE, "")
        is_known = hmac.compare_digest(cookie.encode(), self.cookie.encode())
        return is_known or self.is_token(request.headers.get(HEADER))

    @property
    def cookie(self) -> str:
        """What opens the page; nothing else can be done with it."""
        return hashlib.sha256(f"mien monitor, read: {self.token}".encode()).hexdigest()
