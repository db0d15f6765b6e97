"""Randomness as a pure function of (seed, step, name): the same on every backend and after a resume.

Four users: the order of rows, the initial adapter, dropout masks, and the tokens that are drawn. The dropout hash is
plain 32-bit integer arithmetic, so that a GPU can make a mask where it needs it; `dropout_mask` is its specification.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# lowbias32 of Chris Wellons' hash-prospector: xor-shift 16, multiply, xor-shift 15, multiply, xor-shift 16.
MIX_A, MIX_B = 0x7FEB352D, 0x846CA68B
SLOT_STRIDE = 0x9E3779B1  # odd, so that slots spread over all 32 bits
KEEP_BITS = 24


def key64(*parts: object) -> int:
    """Return 64 bits that depend on every part.

    >>> key64(0, "rows", 1) == key64(0, "rows", 1) != key64(0, "rows", 2)
    True
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator(*parts: object) -> np.random.Generator:
    """Return a NumPy generator (Philox, counter-based) for these parts."""
    return np.random.Generator(np.random.Philox(key=key64(*parts)))


@lru_cache(maxsize=2)  # every update of an epoch asks for it: 20 ms each at a million rows
def row_order(*, seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """Return the order of rows in an epoch, (num_rows,) int32 or int64, read-only."""
    order = permutation(generator(seed, "rows", epoch), num_rows)
    order.setflags(write=False)
    return order


def permutation(random: np.random.Generator, size: int) -> np.ndarray:
    """Return what `random.permutation(size)` does in half its memory: four bytes per number where they suffice.

    >>> bool((permutation(generator(0), 9) == generator(0).permutation(9)).all())
    True
    """
    return random.permutation(np.arange(size, dtype=np.int32 if size < 2**31 else np.int64))


def uniform(*, seed: int, name: str, shape: tuple[int, ...], bound: float) -> np.ndarray:
    """Return float32 values from U(-bound, bound), a function of (seed, name, shape)."""
    unit = generator(seed, "init", name).random(shape, dtype=np.float32)
    return (unit * np.float32(2) - np.float32(1)) * np.float32(bound)


def normal(*, seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 values from N(0, 1), a function of (seed, name, shape)."""
    return generator(seed, "init", name).standard_normal(shape, dtype=np.float32)


def gumbel(ids_K: np.ndarray, *, key: int) -> np.ndarray:
    """Return (K,) float64 Gumbel noise of tokens, each a function of (key, id): -log(-log(u)), u of 53 bits in (0, 1).

    key: 64 bits, of `key64`.
    """
    ids_K, low, high = ids_K.astype(np.uint32), np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
    upper_K = mix32(mix32(ids_K ^ low) ^ high)
    lower_K = mix32(mix32(ids_K + high) ^ low ^ np.uint32(SLOT_STRIDE))
    unit_K = (upper_K * 2.0**21 + (lower_K >> np.uint32(11)) + 0.5) * 2.0**-53
    return -np.log(-np.log(unit_K))


def mix32(x: np.ndarray) -> np.ndarray:
    """Return well-mixed uint32 words; a bijection."""
    x = x.astype(np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(MIX_A)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(MIX_B)
    return x ^ (x >> np.uint32(16))


def token_keys(*, seed: int, step: int, slots_BT: np.ndarray, times_BT: np.ndarray) -> np.ndarray:
    """Return (B, T) uint32, one word per token of an update, whatever micro-batch it stands in.

    slots_BT: place of the token's example in its update. times_BT: place of the token in its example.
    """
    base = np.uint32(key64(seed, "dropout", step) & 0xFFFFFFFF)
    return mix32(mix32((slots_BT.astype(np.uint32) * np.uint32(SLOT_STRIDE)) ^ base) + times_BT.astype(np.uint32))


def column_keys(*, name: str, width: int) -> np.ndarray:
    """Return (D,) uint32, one word per input feature of the layer called `name`."""
    base = np.uint32(key64("column", name) & 0xFFFFFFFF)
    return mix32(np.arange(width, dtype=np.uint32) + base)


def keep_threshold(p: float) -> int:
    """Return the bound on the hash's top 24 bits: at or above it, a feature is kept."""
    return round(p * 2**KEEP_BITS)


def dropout_mask(
    *, seed: int, step: int, name: str, slots: Sequence[int], shape: tuple[int, int], p: float
) -> np.ndarray:
    """Return (B, T, D) bool, true where a feature is kept, for `slots` (B) and shape (T, D)."""
    slots_B1, times_1T = np.asarray(slots)[:, None], np.arange(shape[0])[None]
    token_BT = token_keys(seed=seed, step=step, slots_BT=slots_B1, times_BT=times_1T)
    column_D = column_keys(name=name, width=shape[1])
    hash_BTD = mix32(token_BT[:, :, None] ^ column_D[None, None, :])
    return (hash_BTD >> np.uint32(32 - KEEP_BITS)) >= np.uint32(keep_threshold(p))
