"""Addresses of servers and the names of the variables that hold their keys, as recipes give them.

A key itself never stands in a recipe, and no error shows one.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import HttpUrl, TypeAdapter


def is_base_url(value: str) -> str:
    try:
        url = TypeAdapter(HttpUrl).validate_python(value)
        str(url.host).encode("idna")
    except ValueError:
        raise ValueError("Give the base URL of a server, like http://localhost:8000/v1") from None
    if url.username or url.password or url.query or url.fragment:
        raise ValueError("Give the base URL alone: the key belongs in the environment variable that key names")
    return str(url).rstrip("/")


HIDDEN = "(hidden)"


def hide_password(value: Any) -> Any:
    # Errors show the value.
    return re.sub(r"//[^/@]*@", f"//{HIDDEN}@", value) if isinstance(value, str) else value


def hide_secret(value: Any) -> Any:
    # Errors show the value. It is hidden, since it may be the key itself.
    return value if isinstance(value, str) and re.fullmatch(r"[A-Z_][A-Z0-9_]*", value) else HIDDEN


def is_variable(value: str) -> str:
    if value == HIDDEN:
        raise ValueError("Give the name of the environment variable that holds the key, in capitals, and not the key")
    return value
