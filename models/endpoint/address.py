"""Reads an endpoint's address from the settings, and its key from the environment."""

from __future__ import annotations

import os
import re

import httpx
from pydantic import SecretStr

from constitutions.errors import UserError


def base_url(address: str) -> str:
    """The address up to its version ("/v1"), which `address` may have or leave out.

    Raises:
        UserError: it is not a plain http(s) address.
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
    """Whether the port is valid: httpx takes any number, and fails only when it connects."""
    return url.port is None or 0 < url.port < 2**16


def key_in(variable: str, where: str = "setting 'key_variable'") -> SecretStr:
    """The key in an environment variable.

    Args:
        where: what messages call the place that names the variable.

    Raises:
        UserError: the variable is not set, or its text cannot be a key.
    """
    key = SecretStr(os.environ.get(variable, "").strip())
    if not key:
        raise UserError(
            f"the environment variable {variable} is not set",
            where=where,
            fix=f"export {variable}=… before the run, or leave it out for a server without",
        )
    if not re.fullmatch(r"[!-~]+", key.get_secret_value()):
        raise UserError(  # h11's own error would quote the header, and so the key
            f"the environment variable {variable} holds no key",
            where=where,
            expected="printable ASCII characters without spaces",
        )
    return key
