"""Finds the proxy that a client uses; no client uses one for this machine's loopback.

The proxy of a company cannot reach this machine's own servers. `models.endpoint.client` calls
`proxy_of`; for the clients inside Prefect and MLflow the command line calls `keep_loopback_direct`
once.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import NamedTuple
from urllib.parse import urlsplit

DIRECT = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1")
"""Loopback in NO_PROXY. httpx reads addresses in it; requests reads networks too."""


class Proxy(NamedTuple):
    """A proxy, and where it is set."""

    address: str
    """It may contain a password, so messages show only the `source`."""
    source: str
    """"$HTTPS_PROXY", for example, or "the system's settings"."""


def is_loopback(host: str) -> bool:
    """Whether a host's name or address, in any spelling, is this machine's loopback."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(name))  # "127.1", "0x7f000001"
        except (OSError, ValueError):
            return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return mapped.is_loopback or mapped.is_unspecified


def proxy_of(url: str) -> Proxy | None:
    """The proxy that the environment sets for a URL; None for loopback and hosts in NO_PROXY."""
    from urllib.request import getproxies, proxy_bypass  # slow to import

    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    host, found = parts.hostname or "", getproxies()
    scheme = next((s for s in (parts.scheme, "all") if found.get(s)), None)
    if not host or scheme is None or is_loopback(host) or proxy_bypass(host):
        return None
    name = f"{scheme}_proxy"
    names = [n for n in (name, name.upper()) if os.environ.get(n)]
    address = found[scheme] if "://" in found[scheme] else f"http://{found[scheme]}"
    return Proxy(address, f"${names[0]}" if names else "the system's settings")


def keep_loopback_direct() -> None:
    """Add loopback to NO_PROXY, for this process and its children."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    listed = [entry.strip() for entry in given.split(",") if entry.strip()]
    value = ",".join([*listed, *(entry for entry in DIRECT if entry not in listed)])
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = value
