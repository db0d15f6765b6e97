"""What fits: the settings a run takes by itself, the largest ones on a machine, and a config that fits.

Everything here is a pure function of the config, the model's headers, the rows' lengths and a limit in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shared.config import RunConfig, validate
from shared.data.layout import AUTO_MICRO_TOKENS, GPU_MICRO_TOKENS
from shared.errors import OutOfMemory
from shared.estimate.machines import GIB, Machine
from shared.estimate.memory import Estimate, Work, estimate
from shared.estimate.shapes import Shape
from shared.types import Recompute

COMFORT = 0.9  # auto settings stay below this share of the limit: estimates are within 10 %
SMALL_MICRO = 1024  # positions; smaller micro-batches leave a device idle, so recompute is tried first
FALLBACK = "affine-4bit-g64"
LONGEST = 2**20  # tokens, of rows where the model states no limit, and of micro-batches


@dataclass(frozen=True)
class Lengths:
    """The rows of a data set: tokens of each, and how many of them are supervised."""

    tokens: Sequence[int]
    supervised: Sequence[int]
    known: bool  # false: no data was readable, data.max_length stands in
    num_fair: int | None = None  # so many of the first are a fair choice of what updates take, None: all of them are

    @property
    def longest(self) -> int:
        """Return the tokens of the longest row."""
        return max(self.tokens)

    def cut(self, length: int) -> Lengths:
        """Return the lengths of the rows cut, or where no data is known made, at another length."""
        if not self.known:
            return made_lengths(length)
        tokens, supervised = ([min(n, length) for n in lengths] for lengths in (self.tokens, self.supervised))
        return replace(self, tokens=tokens, supervised=supervised)


@dataclass(frozen=True)
class Decision:
    """How a run is cut and whether it recomputes, and what it is estimated to need."""

    micro_tokens: int
    recompute: Recompute
    estimate: Estimate
    limit: int
    fits: bool

    @property
    def note(self) -> str:
        """Return the decision as a line for the user."""
        state = "on" if self.recompute else "off"
        size, limit = self.estimate.peak / GIB, self.limit / GIB
        return f"micro-batches of {self.micro_tokens} tokens, recompute {state}: {size:.1f} of {limit:.1f} GB"


def made_lengths(length: int) -> Lengths:
    """Return the lengths of a data set of which only the largest possible row is known."""
    return Lengths([length], [length], known=False)


def largest_work(config: RunConfig, lengths: Lengths, *, micro_tokens: int) -> Work:
    """Return the micro-batch of the longest rows; those of shorter rows have no more positions, and shorter ones."""
    longest = lengths.longest
    rows = min(config.train.batch_size, max(1, micro_tokens // longest))
    share = max(n / total for n, total in zip(lengths.supervised, lengths.tokens, strict=True))
    short = min(micro_tokens, config.train.batch_size * longest)  # what rows that divide it better would fill
    positions = max(rows * longest, short if lengths.known and len(set(lengths.tokens)) > 1 else 0)
    count = -(-config.train.batch_size // rows)
    if lengths.known and len(set(lengths.tokens)) > 1 and config.train.batch_size > 1:
        count = max(count, 2)  # an update of mixed lengths may be cut where that saves padding
    return Work(positions, longest, round(positions * share), count)


def settings(config: RunConfig, lengths: Lengths, *, place: str) -> Iterator[tuple[int, Recompute]]:
    """Yield (micro_tokens, recompute) from the fastest to the smallest, those that the config fixes fixed."""
    micro, recompute = config.train.micro_tokens, config.train.recompute
    first = GPU_MICRO_TOKENS if place.endswith("gpu") else AUTO_MICRO_TOKENS
    sizes = [first] if micro == "auto" else [micro]
    while micro == "auto" and sizes[-1] > lengths.longest:
        sizes.append(sizes[-1] // 2)
    for state in (False, True) if recompute == "auto" else (recompute,):
        for size in sizes:
            if state or recompute != "auto" or size >= SMALL_MICRO or size == sizes[0]:
                yield size, state


def decide(config: RunConfig, shape: Shape, lengths: Lengths, machine: Machine) -> Decision:
    """Return the fastest settings that fit comfortably, else the smallest ones there are."""
    found = None
    for micro, recompute in settings(config, lengths, place=machine.place):
        work = largest_work(config, lengths, micro_tokens=micro)
        size = estimate(config, shape, work, place=machine.place, recompute=recompute)
        found = Decision(micro, recompute, size, machine.limit, fits=size.peak <= machine.limit)
        if size.peak <= COMFORT * machine.limit:
            return found
    assert found is not None
    return found


def check_fits(decision: Decision, config: RunConfig, shape: Shape, lengths: Lengths, machine: Machine) -> None:
    """Raise OutOfMemory, with what would fit, where a run cannot.

    Where the factors of activations are borrowed, only weights, adapter, optimizer and gradients count: they are exact.
    """
    found = decision.estimate
    exact = sum(found[name] for name in ("weights", "adapter", "optimizer", "gradients"))
    sure = found.peak if found.measured else exact
    if sure <= machine.limit:
        return
    largest = max((part for part in found.parts if part.at_peak), key=lambda part: part.bytes)
    raise OutOfMemory(
        f"this run needs about {sure / GIB:.1f} GB ({largest.name}: {largest.bytes / GIB:.1f}), {machine.name} gives "
        f"{machine.limit / GIB:.1f}",
        fix=advice(config, shape, lengths, machine),
    )


def advice(config: RunConfig, shape: Shape, lengths: Lengths, machine: Machine) -> str:
    """Return the changes that make a run fit, as one line."""
    changes = fit_changes(config, shape, lengths, machine)
    return "a smaller model, or a machine with more memory" if changes is None else as_line(changes)


def as_line(changes: dict[str, Any]) -> str:
    """Return settings as one line.

    >>> as_line({"train.micro_tokens": 64, "train.recompute": True})
    'train.micro_tokens: 64, train.recompute: true'
    """
    return ", ".join(
        f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()
    )


def fit_changes(config: RunConfig, shape: Shape, lengths: Lengths, machine: Machine) -> dict[str, Any] | None:
    """Return the least changes that make a run fit, by key, None where none do.

    In this order: micro-batches and recompute (the result stays the same), then quantization of the base, then
    shorter rows.
    """
    for scheme in (None, FALLBACK) if can_quantize(config, shape) else (None,):
        changed = with_settings(config, {"quantization": scheme} if scheme else {})
        free = with_settings(changed, {"train.micro_tokens": "auto", "train.recompute": "auto"})
        for candidate in (changed, free):
            found = decide(candidate, shape, lengths, machine)
            if found.estimate.peak <= machine.limit:
                return differences(config, found, quantization=scheme)
    smallest = with_settings(config, {"quantization": FALLBACK} if can_quantize(config, shape) else {})
    longest = longest_length(smallest, shape, lengths, machine)
    if longest is None:
        return None
    free = with_settings(smallest, {"train.micro_tokens": "auto", "train.recompute": True, "data.max_length": longest})
    found = decide(free, shape, lengths.cut(longest), machine)
    return {**differences(config, found, quantization=smallest.quantization), "data.max_length": longest}


def differences(config: RunConfig, found: Decision, *, quantization: str | None) -> dict[str, Any]:
    """Return the settings of a decision that the config does not have."""
    changes: dict[str, Any] = {}
    if quantization and quantization != config.quantization:
        changes["quantization"] = quantization
    if config.train.micro_tokens != found.micro_tokens:
        changes["train.micro_tokens"] = found.micro_tokens
    if config.train.recompute != found.recompute:
        changes["train.recompute"] = found.recompute
    return changes


def can_quantize(config: RunConfig, shape: Shape) -> bool:
    """Return whether the base could be quantized at load and is not."""
    return config.adapter.type != "none" and config.quantization == "none" and not shape.schemes


def with_settings(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """Return the config with values replaced by dotted key."""
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[leaf] = value
    return validate(values)


def longest_length(config: RunConfig, shape: Shape, lengths: Lengths, machine: Machine) -> int | None:
    """Return the longest data.max_length that fits, one row per micro-batch, with recompute unless that is fixed."""
    recompute = config.train.recompute is not False

    def fits(length: int) -> bool:
        work = Work(length, length, length, config.train.batch_size)
        found = estimate(config, shape, work, place=machine.place, recompute=recompute)
        return found.peak <= COMFORT * machine.limit

    return largest_where(fits, most=shape.info.max_positions or LONGEST)


def most_micro_tokens(config: RunConfig, shape: Shape, lengths: Lengths, machine: Machine) -> int | None:
    """Return the largest train.micro_tokens that fits at the rows' own length, with recompute unless that is fixed."""
    recompute = config.train.recompute is not False

    def fits(micro: int) -> bool:
        longest = min(micro, lengths.longest)
        work = Work(micro, longest, micro, -(-config.train.batch_size * longest // micro))
        found = estimate(config, shape, work, place=machine.place, recompute=recompute)
        return found.peak <= COMFORT * machine.limit

    return largest_where(fits, most=LONGEST)


def largest_where(fits: Callable[[int], bool], *, most: int) -> int | None:
    """Return the largest number from 1 to `most` that fits, rounded down to two digits in binary; None where none does.

    >>> largest_where(lambda n: n < 1000, most=4096), largest_where(lambda n: True, most=1000)
    (768, 1000)
    """
    best, size = None, 1
    while size <= most:
        for number in (size, size + size // 2):
            if number > most or not fits(number):
                break
            best = number
        size *= 2
    return most if fits(most) else best
