"""`mlxlora evaluate`: the loss of a model on rows, and what it answers to their prompts."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxlora.cli.options import (
    Adapted,
    AdapterPath,
    BackendName,
    Debug,
    Dtype,
    Json,
    Quantization,
    Set,
    check_backend,
    check_choice,
)
from mlxlora.cli.output import AnswerFile, emit_object, say

if TYPE_CHECKING:
    from shared.config import DataConfig
    from shared.data.rows import Row
    from shared.evaluating.exams import Graded
    from shared.sessions import Session


READING = ("columns", "max_length", "train_on")  # settings of data that decide how rows are read
DataPaths = Annotated[
    list[str],
    typer.Option("--data", metavar="PATH", help="File, or folder (valid, else test, else train); several times."),
]
Split = Annotated[str | None, typer.Option("--split", metavar="train|valid|test", help="Which file of a folder.")]
MaxLength = Annotated[int, typer.Option("--max-length", min=2, help="Longer rows are cut, tokens.")]
TrainOn = Annotated[
    str, typer.Option("--train-on", metavar="completion|assistant|all", help="Tokens that count for the loss.")
]
Generate = Annotated[
    str | None, typer.Option("--generate", metavar="N|all", help="Answer the first N prompts greedily; score them.")
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Of an answer at most; 128 by default.")]
Answers = Annotated[Path | None, typer.Option("--answers", metavar="FILE", help="Write every answer, a line of JSON.")]


def evaluate(
    model: Adapted, data: DataPaths, adapter: AdapterPath = None, split: Split = None, max_length: MaxLength = 2048,
    train_on: TrainOn = "completion", generate: Generate = None, max_tokens: MaxTokens = None, answers: Answers = None,
    overrides: Set = None, backend: BackendName = "auto", dtype: Dtype = "auto", quantization: Quantization = "auto",
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Loss in nats per supervised token, and perplexity; with --generate exact match, token F1, ROUGE-L."""
    from shared.sessions import answer_rows, evaluate_rows, find_rows, open_session

    check_choice("--split", split, (None, "train", "valid", "test"))
    check_choice("--dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    check_choice("--train-on", train_on, ("completion", "assistant", "all"))
    check_backend(backend)
    asked = number_of(generate, answers, max_tokens)
    rows_as = row_settings(overrides or [], max_length=max_length, train_on=train_on)
    sets = {path: find_rows(path, split=split, columns=rows_as.columns) for path in data}
    found: list[dict[str, Any]] = []
    with AnswerFile(answers, option="--answers") if answers is not None else nullcontext() as lines:
        session = open_session(
            model, adapter=adapter, backend=backend, dtype=dtype, quantization=quantization, note=say
        )
        for path, (rows, file) in sets.items():
            tell_notices(rows, session)
            loss = evaluate_rows(session, rows, max_length=rows_as.max_length, train_on=rows_as.train_on, note=say)
            graded = answer_rows(session, rows, number=asked, max_tokens=max_tokens, note=say) if asked else []
            if lines is not None:
                write_answers(lines, graded, data=path)
            facts = {"scores": scores_of(graded), "file": file, "data": path, "backend": session.backend.name}
            found.append(vars(loss) | facts)
    if as_json:
        emit_object(found[0] if len(found) == 1 else {"sets": found})
    for facts in found if not as_json else ():
        show(facts, name="file" if len(found) == 1 else "data")


def tell_notices(rows: list[Row], session: Session) -> None:
    """Say what of rows does not reach the model, and what is odd about them."""
    from shared.data.notices import find_notices, sample_rows

    for notice in find_notices(sample_rows(rows), session.tokenizer, total=len(rows)):
        say(notice.text)


def row_settings(overrides: list[str], *, max_length: int, train_on: str) -> DataConfig:
    """Return how rows are to be read, with --set of data.columns and the like on top; raises ConfigError for others."""
    from shared.config_file import build_config, parse_override
    from shared.errors import ConfigError

    for text in overrides:
        sections = parse_override(text)
        inner = sections.get("data")
        if len(sections) > 1 or not isinstance(inner, dict) or not inner.keys() <= set(READING):
            expected = ", ".join(f"data.{key}" for key in READING)
            raise ConfigError(f"--set {text}: a setting that evaluate has no use for", expected=f"one of {expected}")
    data = {"path": "rows", "max_length": max_length, "train_on": train_on}
    return build_config({"model": "model", "data": data}, overrides=overrides).data


def number_of(generate: str | None, answers: Path | None, max_tokens: int | None) -> int | None:
    """Return how many prompts to answer, None for none of them; raises ConfigError."""
    from shared.errors import ConfigError

    if generate is None:
        for option, value in (("--answers", answers), ("--max-tokens", max_tokens)):
            if value is not None:
                raise ConfigError(f"{option} without --generate, which makes answers", fix="--generate 100")
        return None
    if generate != "all" and not (generate.isascii() and generate.isdigit() and int(generate)):
        raise ConfigError(f"--generate {generate}", expected="a number of prompts, or all")
    return 2**62 if generate == "all" else int(generate)


def scores_of(graded: list[Graded]) -> dict[str, float]:
    """Return the mean scores of answers and how many these are; empty without any."""
    from shared.evaluating.exams import mean_scores

    return {"answers": len(graded), **mean_scores(graded)} if graded else {}


def show(found: dict[str, Any], *, name: str) -> None:
    """Print what was found on one set of rows; name: the key of what it is called."""
    print(
        f"{found[name]}: loss {found['loss']:.4f} nats/token, perplexity {found['perplexity']:.2f} "
        f"({found['supervised_tokens']:,} supervised of {found['tokens']:,} tokens, {found['rows']} rows)"
    )
    scores = found["scores"]
    if scores:
        shares = [f"{key.replace('_', ' ')} {100 * scores[key]:.1f} %" for key in scores if key != "answers"]
        print(f"{found[name]}: {', '.join(shares)} ({scores['answers']} answers)")


def write_answers(lines: AnswerFile, graded: list[Graded], *, data: str) -> None:
    """Write the answers to a set of rows; raises OSError."""
    for answer in graded:
        lines.add(lines.next, {"data": data, **vars(answer)})
