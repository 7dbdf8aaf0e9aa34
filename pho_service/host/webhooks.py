"""
Webhooks: where they may go, and how one is signed and sent.

The signature is that of Standard Webhooks: receivers can check it with its libraries, or by hand.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self
from urllib.parse import SplitResult, urlsplit

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_exponential

from pho_service.errors import InvalidInput, PhoError, shown
from pho_service.host.settings import Settings

TIMEOUT_S = 10.0  # of a request, from the connection to the status, however slowly it comes
_AT_ONCE = 3  # attempts, before the next ones minutes later
_PORTS = {"http": 80, "https": 443}
_CARRIES_IPV4 = ipaddress.ip_network("64:ff9b::/96")  # a gateway would go to the IPv4 address in it

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class NotDelivered(PhoError):
    """A webhook was not taken; another attempt may help."""


@dataclass(frozen=True, kw_only=True)
class WebhookRules:
    """Where webhooks may go."""

    hosts: tuple[str, ...]  # Shell patterns; none is allowed without any
    secret: bytes | None  # Key that they are signed with; without it none are sent
    private: bool  # Whether addresses that are not public are allowed

    @classmethod
    def of(cls, settings: Settings) -> Self:
        secret = settings.notify_secret
        return cls(
            hosts=tuple(pattern.lower() for pattern in settings.notify_hosts),
            secret=None if secret is None else _key(secret.get_secret_value()),
            private=settings.notify_private,
        )

    def check(self, url: str) -> SplitResult:
        """The parts of a URL that a webhook may go to."""
        parts, host = _parts(url)
        if self.secret is None:
            raise InvalidInput(
                "this service sends no webhooks, because it has no secret to sign them with. The "
                "operator sets PHO_NOTIFY_SECRET; leave notify out otherwise."
            )
        if not any(fnmatchcase(host, pattern) for pattern in self.hosts):
            allowed = ", ".join(self.hosts) or "none"
            raise InvalidInput(
                f"webhooks to {shown(host)} are not allowed here. Allowed hosts are: {allowed}; "
                "the operator sets PHO_NOTIFY_HOSTS."
            )
        try:
            literal = ipaddress.ip_address(host)
        except ValueError:
            return parts
        self._check_address(host, literal)
        return parts

    def _check_address(self, host: str, address: Address) -> None:
        if not (self.private or is_public(address)):
            raise InvalidInput(
                f"{shown(host)} is at {address}, which is not a public address. The operator "
                "allows those with PHO_NOTIFY_PRIVATE=true."
            )

    def address(self, parts: SplitResult) -> str:
        """The address to connect to: what the name stands for now, all of which must be allowed."""
        host, port = str(parts.hostname), parts.port or _PORTS[parts.scheme]
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise NotDelivered(f"{host} has no address: {error}") from error
        addresses = [str(info[4][0]).partition("%")[0] for info in infos]
        for address in addresses:
            self._check_address(host, ipaddress.ip_address(address))
        return addresses[0]


def is_public(address: Address) -> bool:
    """Return whether an address is on the internet, and carries none that may not be."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is not None or address.teredo is not None or address in _CARRIES_IPV4:
            return False
    return address.is_global and not address.is_multicast


def signature(secret: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Return v1, and base64 of the HMAC-SHA256 of id.timestamp.body: ``webhook-signature``."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    digest = hmac.new(secret, signed, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def send(
    rules: WebhookRules,
    url: str,
    message_id: str,
    body: bytes,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Send a webhook, a few times within seconds if it must be."""
    # The connection goes to the very address that was checked; no redirect and no proxy is
    # followed.
    retrying = Retrying(
        retry=retry_if_exception_type(NotDelivered),
        wait=wait_exponential(multiplier=0.5, max=5),
        stop=stop_after_attempt(_AT_ONCE),
        sleep=sleep,
        reraise=True,
    )
    retrying(_send_once, rules, url, message_id, body)


def _send_once(rules: WebhookRules, url: str, message_id: str, body: bytes) -> None:
    parts = rules.check(url)
    assert rules.secret is not None  # checked
    address = rules.address(parts)
    timestamp = int(time.time())
    headers = {
        "Host": parts.netloc,
        "Content-Type": "application/json",
        "User-Agent": "PHO",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(rules.secret, message_id, timestamp, body),
    }
    target = httpx.URL(url).copy_with(host=address)
    name = {"sni_hostname": str(parts.hostname)} if parts.scheme == "https" else {}

    async def status_of() -> int:
        # The time-outs of httpx are for each read: who sends a letter now and then passes them.
        async with (
            asyncio.timeout(TIMEOUT_S),
            httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=TIMEOUT_S) as client,
            client.stream("POST", target, content=body, headers=headers, extensions=name) as answer,
        ):
            return answer.status_code

    try:
        status = asyncio.run(status_of())
    except TimeoutError:
        raise NotDelivered(f"{parts.hostname} has not answered within {TIMEOUT_S:g} s") from None
    except httpx.HTTPError as error:
        raise NotDelivered(f"{parts.hostname} cannot be reached: {error}") from error
    if not 200 <= status < 300:
        told = " Redirects are not followed." if 300 <= status < 400 else ""
        raise NotDelivered(f"{parts.hostname} answers {status}.{told}")


def _parts(url: str) -> tuple[SplitResult, str]:
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL) as error:
        raise InvalidInput(f"{shown(url)} is not a URL: {error}") from error
    if parts.scheme not in _PORTS or not host or "@" in parts.netloc or port == 0:
        raise InvalidInput(
            f"{shown(url)} is not a URL that a webhook can go to. Write "
            "https://host.example/path, without user and password."
        )
    return parts, host


def _key(secret: str) -> bytes:
    """The bytes that sign: as Standard Webhooks has it, base64 after ``whsec_``."""
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error as error:
        raise InvalidInput(f"PHO_NOTIFY_SECRET is not base64 after whsec_: {error}.") from error
