"""Credentials, taken out of every text that is written or shown."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
SECRET_NAME = re.compile(r"(TOKEN|API_?KEY|SECRET|SECRET_ACCESS_KEY|PASSWORD|PASSWD)$", re.IGNORECASE)
SHAPES = (
    (re.compile(r"(:/{1,2})[^/\s@'\"]+:[^\s'\"]*@"), rf"\1{HIDDEN}@"),  # a password may hold / and @
    (re.compile(r"(:/{1,2})[^/\s@'\"]+@"), rf"\1{HIDDEN}@"),  # https://user:password@host, also as a path shows it
    (re.compile(r"\b(Bearer\s+)\S+", re.IGNORECASE), r"\1" + HIDDEN),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), HIDDEN),
    (
        re.compile(r"((?:token|api_?key|secret|password)=|(?:api_?key|secret|password):\s*)[^\s&'\"]+", re.IGNORECASE),
        r"\1" + HIDDEN,
    ),
)
SHORTEST = 8  # a shorter value of a variable may stand in any text by chance


def mask(text: str) -> str:
    """Return a text without the values of variables such as HF_TOKEN, and without credentials in addresses.

    >>> mask("https://me:secret@host/x?token=abc")
    'https://***@host/x?token=***'
    >>> mask("postgresql+psycopg://me:p/a@ss@host/db, Authorization: Bearer abc.def")
    'postgresql+psycopg://***@host/db, Authorization: Bearer ***'
    """
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST and not value.startswith(("/", "~", ".")):  # no paths
            text = text.replace(value, HIDDEN)
    for shape, replacement in SHAPES:
        text = shape.sub(replacement, text)
    return text
