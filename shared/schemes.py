"""The names of storage formats: what a config's `quantization` may say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from shared.errors import ConfigError, did_you_mean
from shared.types import FIXED, TERNARY_RULES, Scheme

DOUBLED = ("nf4", "fp4")  # formats whose scales may be quantized too


@cache
def named_schemes() -> dict[str, Scheme]:
    """Return every scheme that a config can name, by its name."""
    groups = (32, 64, 128)
    affine = [Scheme("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in groups]
    schemes = [
        *affine,
        *(replace(scheme, solver="hqq") for scheme in affine),
        *(Scheme("ternary", 2, group, solver=rule) for group in groups for rule in ("", *TERNARY_RULES)),
        *(
            Scheme(name, *FIXED[name], double=double)
            for name in FIXED
            for double in (False, True)[: 1 + (name in DOUBLED)]
        ),
    ]
    return {str(scheme): scheme for scheme in schemes}


def parse_scheme(text: str, *, option: str = "quantization", more: Sequence[str] = ()) -> Scheme | None:
    """Return the scheme a quantization name stands for, None for "none".

    Raises ConfigError for an unknown name; option: where it was given; more: what else it takes.

    >>> parse_scheme("affine-4bit-g64")
    Scheme(name='affine', bits=4, group_size=64, double=False, solver='')
    """
    if text == "none":
        return None
    if scheme := named_schemes().get(text):
        return scheme
    if short := re.match(r"(?:q|int)?([234568])", text):
        raise ConfigError(
            f'{option}: unknown scheme "{text}"', code="E202", fix=f'did you mean "affine-{short[1]}bit-g64"?'
        )
    hint = did_you_mean(text, ["none", *more, *named_schemes()])
    listed = "`mlxlora doctor` lists them, e.g. affine-4bit-g64"  # hundreds, with the solvers
    raise ConfigError(f'{option}: unknown scheme "{text}"', code="E202", fix=hint if hint.startswith("did") else listed)
