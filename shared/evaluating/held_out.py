"""The rows that a run is evaluated on: those of valid.jsonl, those of evaluation.sets, and the prompts to answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from shared.config import DataConfig, RunConfig
from shared.data.formats import read_values
from shared.data.rows import Row, content_hash, find_data, find_split, no_rows
from shared.data.sources import drop_long, read
from shared.data.tokenize import Tokenizer
from shared.errors import DataError
from shared.evaluating.exams import Exam, make_questions
from shared.hub import pinned
from shared.types import Example


@dataclass(frozen=True)
class HeldOut:
    """Rows by the name of their set, "" those of valid.jsonl; where the sets were found, and their files."""

    rows: dict[str, list[Row]] = field(default_factory=dict[str, list[Row]])
    roots: dict[str, Path] = field(default_factory=dict[str, Path])
    files: dict[str, Path] = field(default_factory=dict[str, Path])  # evaluation.sets.NAME/FILE, as in the manifest
    dropped: dict[str, int] = field(default_factory=dict[str, int])  # why -> rows of the sets left out


def load_sets(config: RunConfig) -> HeldOut:
    """Return the rows of evaluation.sets, as many as are evaluated on; raises DataError with the set's name."""
    found = HeldOut()
    dropped: dict[str, int] = dict.fromkeys(config.data.drop, 0)
    for name, path in config.evaluation.sets.items() if config.evaluation.every is not None else ():
        try:
            root = find_data(path)
            files = find_split(root)
            rows = list(read(files, fitting(config.data, files[0]), dropped, prefix=f"{name}/"))
            if not rows:
                raise no_rows(files[0])
        except DataError as error:
            what = f"evaluation.sets.{name}: {error.what}"
            raise DataError(what, code=error.code, expected=error.expected, fix=error.fix) from None
        found.rows[name] = rows[: most_rows(config)]
        found.roots[name] = root
        found.files.update({f"evaluation.sets.{name}/{file.name}": file for file in files})
    return replace(found, dropped=dropped)


def with_valid(sets: HeldOut, valid: list[Row], config: RunConfig) -> HeldOut:
    """Return the rows to evaluate on: those of the valid split first, as many as are evaluated on."""
    if config.evaluation.every is None:
        return sets
    return replace(sets, rows={"": valid[: most_rows(config)], **sets.rows})


def most_rows(config: RunConfig) -> int | None:
    """Return how many rows of each set are evaluated on at most, None: all of them."""
    batches = config.evaluation.batches
    return None if batches == "all" else batches * config.train.batch_size


def fitting(data: DataConfig, file: Path) -> DataConfig:
    """Return the settings for a set of its own: data.columns only where its first row has one of them."""
    first = next((value for value, _ in read_values(file)), None)
    own = isinstance(first, dict) and not any(name in first for name in data.columns.values())
    return data.model_copy(update={"columns": {}}) if own else data


def keep_short(found: HeldOut, examples: Mapping[str, list[Example]], *, most: int) -> dict[str, list[Example]]:
    """Return every set's examples of at most so many tokens; the rows of the others leave `found`. Raises DataError."""
    for name, some in examples.items():
        pairs = zip(found.rows[name], some, strict=True)
        found.rows[name] = [row for row, example in pairs if len(example.tokens) <= most]
    return {name: drop_long(some, (len(some),), most=most)[0] for name, some in examples.items()}


def make_exam(found: HeldOut, tokenizer: Tokenizer, config: RunConfig) -> Exam | None:
    """Return the first prompts of every set, as many as the config wants answered; None where it wants none."""
    asked = config.evaluation.generate
    if asked is None:
        return None
    first = {name: rows if asked == "all" else rows[:asked] for name, rows in found.rows.items()}
    questions = {name: make_questions(rows, tokenizer) for name, rows in first.items() if rows}
    return Exam(questions, tokenizer, config.evaluation.max_tokens) if questions else None


def hashes_of(found: HeldOut) -> set[str]:
    """Return the hashes of all rows to evaluate on."""
    return {content_hash([row]) for rows in found.rows.values() for row in rows}


def count_leaks(found: HeldOut, train: Collection[str]) -> dict[str, int]:
    """Return how many rows of each set are training rows too, by the hashes of these; sets without any left out."""
    counts = {
        name or "valid.jsonl": sum(content_hash([row]) in train for row in rows) for name, rows in found.rows.items()
    }
    return {name: count for name, count in counts.items() if count}


def pinned_sets(config: RunConfig, found: HeldOut) -> Mapping[str, str]:
    """Return evaluation.sets with the commits of what came from the hub."""
    return {name: pinned(path, found.roots[name]) if name in found.roots else path
            for name, path in config.evaluation.sets.items()}  # fmt: skip
