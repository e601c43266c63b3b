"""An endpoint's address and key, as the settings and the environment give them."""

from __future__ import annotations

import os
import re

import httpx
from pydantic import SecretStr

from constitutions.errors import UserError


def base_url(address: str) -> str:
    """The address with its version; `address` may end before or after its "/v1".

    Raises:
        UserError: it is no plain http(s) address.
    """
    try:
        url = httpx.URL(address.strip())
    except httpx.InvalidURL:
        url = httpx.URL("")
    plain = not (url.userinfo or url.query or url.fragment)
    if url.scheme not in ("http", "https") or not url.host or not plain or not has_port(url):
        raise UserError(  # the address is not shown: it may hold a password
            "this is not the address of a server",
            where="setting 'endpoint'",
            expected='"http(s)://host[:port][/path]", without user, password, "?" or "#"',
            fix="a key goes into the environment variable that key_variable names",
        )
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    if not re.search(r"/v\d\w*(/|\Z)", path):
        path += "/v1"
    return str(url.copy_with(path=path))


def has_port(url: httpx.URL) -> bool:
    """Whether the port is one: httpx takes any number, and fails when it connects."""
    return url.port is None or 0 < url.port < 2**16


def key_in(variable: str) -> SecretStr:
    """The key that an environment variable holds.

    Raises:
        UserError: it is not set, or holds no key.
    """
    key = SecretStr(os.environ.get(variable, "").strip())
    where = "setting 'key_variable'"
    if not key:
        raise UserError(
            f"the environment variable {variable} is not set",
            where=where,
            fix=f"export {variable}=… before the run, or unset key_variable for a server without",
        )
    if not re.fullmatch(r"[!-~]+", key.get_secret_value()):
        raise UserError(  # h11 would quote the header
            f"the environment variable {variable} holds no key",
            where=where,
            expected="printable ASCII characters without spaces",
        )
    return key
