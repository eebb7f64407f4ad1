"""Which addresses a caller's URL may lead to, and what a URL must look like at all.

A worker stands inside a network that the caller of a job does not: what answers there on a private or
link-local address (other machines, the platform's metadata) is not for the caller to read. Knows
nothing of HTTP, and connects to nothing.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final
from urllib.parse import SplitResult, quote, urlsplit

from app.errors import InputError

Address = IPv4Address | IPv6Address
Resolver = Callable[[str, int], Sequence[str]]  # (host, port) -> every address of it, as text

PORTS: Final = frozenset({80, 443, 8080, 8443})
_URL_LENGTH: Final = 8192
UNESCAPED: Final = "%/:=&?~#+!$,;'@()*[]"  # what stays as it is in a path and query; all else is escaped
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_DOTTED: Final = re.compile(r"(0|[1-9]\d{0,2})(\.(0|[1-9]\d{0,2})){3}")

# Written out, from IANA's special-purpose registries: what `ipaddress` counts as global differs between
# patch releases of Python, and takes 6to4, NAT64 and 192.0.0.192 (a metadata service) for public.
_METADATA: Final = tuple(
    ip_network(n)
    for n in (
        "169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::/32", "fd20:ce::/32"
    )
)  # fmt: skip
_PRIVATE: Final = tuple(
    ip_network(n)
    for n in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "::1/128", "fc00::/7")
)
_SPECIAL: Final = tuple(
    ip_network(n)
    for n in (
        "0.0.0.0/8",  # this host
        "100.64.0.0/10",  # carrier-grade NAT
        "169.254.0.0/16",  # link-local
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "198.18.0.0/15",  # benchmarks
        "224.0.0.0/3",  # multicast, reserved, broadcast
        "2001::/23",  # protocol assignments, Teredo
        "2001:db8::/32", "3fff::/20",  # documentation
        "2002::/16",  # 6to4: any IPv4 address in disguise
    )
)  # fmt: skip
_UNICAST: Final = ip_network("2000::/3")  # all of IPv6 that is given out to the public
_NAT64: Final = ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class Target:
    """A URL that may be asked for. `path` is escaped, and holds the query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """Host, and port where it is not the scheme's own, as the Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _default_port(self.scheme) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


def parse_url(url: str, ports: frozenset[int] = PORTS) -> Target:
    """What `url` asks for. Only one spelling of each address is taken.

    Raises:
        InputError: `source_url_invalid`, `source_url_scheme`, `source_url_credentials`,
            `source_url_port`. The message names at most scheme and host: paths and queries of links
            are often secrets.
    """
    url = url.strip()
    if len(url) > _URL_LENGTH:
        raise _invalid(f"it has {len(url):,} characters; the limit is {_URL_LENGTH:,}")
    if re.search(r"[\x00-\x20\x7f\\]", url):
        raise _invalid("it holds a space, a backslash or a control character; escape those as %20 and so on")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _invalid("it cannot be taken apart; expected https://host/path") from None
    if parts.scheme not in ("http", "https"):
        raise InputError(
            "source_url_scheme",
            f"The URL's scheme is {parts.scheme[:20]!r}; expected http or https. Give a link that starts "
            "with https://, or send the file as base64.",
        )
    if "@" in parts.netloc:
        raise InputError(
            "source_url_credentials",
            "The URL holds a user name or password before its host (not shown here); expected none. Give a "
            "signed link instead.",
        )
    port = _default_port(parts.scheme) if port is None else port
    host = _host(parts)
    if port not in ports:
        allowed = ", ".join(map(str, sorted(ports)))
        raise InputError(
            "source_url_port",
            f"The URL's port is {port}; expected one of {allowed}. Serve the file there, or have the port "
            "allowed in SEEDPOD_SOURCE_PORTS.",
        )
    query = f"?{parts.query}" if parts.query else ""
    return Target(parts.scheme, host, port, quote((parts.path or "/") + query, safe=UNESCAPED))


def _host(parts: SplitResult) -> str:
    """The host in lower case, without the dot that may end it."""
    host = parts.hostname or ""
    if parts.netloc.startswith("["):
        try:
            address = IPv6Address(host)
        except ValueError:
            raise _invalid("what stands in brackets is no IPv6 address") from None
        if address.scope_id is not None:
            raise _invalid("its address names a network interface; expected one that is public")
        return str(address)
    if not host.isascii():
        raise _invalid("its host holds characters beyond ASCII; write the host as xn--…")
    host = host.removesuffix(".")
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _invalid("its host is no name; expected letters, digits, hyphens and dots")
    number = _NUMBER.fullmatch(labels[-1])  # an IPv4 address, in one of its many spellings
    if number and not (_DOTTED.fullmatch(host) and all(int(label) < 256 for label in labels)):
        raise _invalid("its host is a number; write an IPv4 address as four decimal numbers with dots")
    return host


def _default_port(scheme: str) -> int:
    return 443 if scheme == "https" else 80


def _invalid(reason: str) -> InputError:
    return InputError("source_url_invalid", f"The URL cannot be used: {reason}.")


def refusal(address: Address, allow_private: bool = False) -> str | None:
    """Why `address` must not be connected to, as a noun, or None if it may.

    With `allow_private`, the machine itself and private networks are allowed; metadata services, which
    hand out credentials, and addresses of no single machine never are.
    """
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return refusal(address.ipv4_mapped, allow_private)
        if address in _NAT64:  # how a network without IPv4 reaches all of it
            return refusal(IPv4Address(int(address) & 0xFFFFFFFF), allow_private)
    if _within(address, _METADATA):
        return "a metadata service"
    if _within(address, _PRIVATE):
        return None if allow_private else "a private or loopback address"
    if _within(address, _SPECIAL) or (address.version == 6 and address not in _UNICAST):
        return "a special-purpose address"
    return None


def _within(address: Address, networks: Sequence[IPv4Network | IPv6Network]) -> bool:
    return any(address in network for network in networks)


def checked_addresses(target: Target, resolve: Resolver, allow_private: bool) -> tuple[Address, ...]:
    """Every address of the target's host, in the resolver's order. Asks the resolver once; whoever
    connects must connect to one of these, as a second answer may differ.

    Raises:
        InputError: `source_address_refused` if a single one of them must not be connected to: a host
            that is both public and private is an attack, or a mistake that works half of the time.
        OSError: The host cannot be resolved.
    """
    try:
        found: Sequence[str] = [str(ip_address(target.host))]
    except ValueError:
        found = resolve(target.host, target.port)
    addresses = tuple(dict.fromkeys(ip_address(text.partition("%")[0]) for text in found))
    if not addresses:
        raise OSError(f"{target.host} has no address")
    for address in addresses:
        if (what := refusal(address, allow_private)) is not None:
            raise InputError(
                "source_address_refused",
                f"The URL's host {target.host} leads to {what}; expected a host on the public internet. Put "
                "the file where anyone with the link can get it, or send it as base64.",
            )
    return addresses


def resolve_name(host: str, port: int) -> list[str]:
    """The system's resolver.

    Raises:
        OSError: The name is not known, or no resolver answers.
    """
    try:
        return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except UnicodeError as error:  # a label too long for the codec in between
        raise OSError(str(error)) from None
