"""`mlxlora generate`: texts that follow prompts, of options or of a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
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
    check_backend,
    check_choice,
)
from mlxlora.cli.output import AnswerFile, emit, emit_object, printable, say
from mlxlora.cli.sampling import FROM_OPTIONS, Settings, check_settings, takes_sampling

if TYPE_CHECKING:
    from shared.data.prompts import Prompt
    from shared.generation.answers import Completion
    from shared.sessions import Session
    from shared.types import Sampling

BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Prompts computed together. [default: 8]")]
Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to go on from; may stand several times.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts", metavar="FILE", help="Prompts: .txt by lines, rows as for training, - for lines of stdin."
    ),
]
Wrap = Annotated[bool | None, typer.Option("--chat/--raw", help="Wrap prompts in the chat template, or not.")]
Output = Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Write answers as JSON lines to a file.")]


@takes_sampling(max_tokens=128, temperature=0, seed=0)
def generate(
    model: Adapted,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    adapter: AdapterPath = None,
    sampling: Settings = FROM_OPTIONS,
    batch_size: BatchSize = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print tokens as they come.")] = False,
    chat: Wrap = None,
    output: Output = None,
    backend: BackendName = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Texts that follow prompts."""
    settings = {**sampling, "batch_size": batch_size}
    check_settings(settings)
    asked = find_prompts(prompt or [], prompts, stream=stream)
    with AnswerFile(output, option="--output") if output is not None else nullcontext() as file:
        session = open_checked(model, adapter=adapter, backend=backend, dtype=dtype, quantization=quantization)
        answer_prompts(session, asked, settings, chat=chat, stream=stream, file=file, as_json=as_json)


def find_prompts(texts: Sequence[str], file: Path | None, *, stream: bool) -> list[Prompt]:
    """Return the prompts of the options; raises ConfigError where there is none."""
    from shared.data.formats import to_text
    from shared.data.prompts import Prompt, read_prompts
    from shared.errors import ConfigError

    found = [Prompt(text) for text in texts]
    if file == Path("-"):
        lines = to_text(sys.stdin.buffer.read(), source="standard input").splitlines()
        found += [Prompt(line) for line in lines if line.strip()]
    elif file is not None:
        found += read_prompts(file.expanduser())
    if not found:
        ways = '--prompt "...", --prompts FILE, or --prompts - for the lines of standard input'
        raise ConfigError("no prompt", fix=f"{ways}; mlxlora generate --help lists more")
    if stream and len(found) > 1:
        raise ConfigError(f"--stream with {len(found)} prompts", expected="one, whose text comes token by token")
    return found


def answer_prompts(
    session: Session, asked: list[Prompt], settings: dict[str, Any], *, chat: bool | None, stream: bool,
    file: AnswerFile | None, as_json: bool,
) -> None:  # fmt: skip
    """Print the answers to prompts, or one JSON object with them; write each to the file as soon as it is there."""
    from shared import sessions
    from shared.generation.answers import Answer

    def keep(number: int, answer: Completion) -> None:
        if file is not None:
            file.add(number, {"prompt": asked[number].messages or asked[number].text, **asdict(answer)})

    sampling = sessions.sampling_for(session, **settings)
    first, *others = asked
    prompts = [sessions.prompt_ids(session, first, chat=chat, note=say)]
    prompts += [sessions.prompt_ids(session, one, chat=chat) for one in others]
    sessions.tell_lost(session, [text for one in asked for text in one.texts], say)
    sessions.check_room(session, prompts, sampling)
    if stream:
        answer = Answer(session.tokenizer.decode, sampling, len(prompts[0]))
        for _, piece, _ in sessions.follow(session, [answer], prompts, sampling):
            print(printable(piece), end="", flush=True)
        print()
        found = [answer.completion()]
        keep(0, found[0])
    else:
        found = complete_noted(session, prompts, sampling, keep)
    show(session, asked, found, as_json=as_json, printed=stream or file is not None)


def complete_noted(
    session: Session, prompts: list[list[int]], sampling: Sampling, keep: Callable[[int, Completion], None]
) -> list[Completion]:
    """Return all answers, each given to `keep` when it is done; where there are many, say on stderr how many are."""
    from shared.sessions import complete_all

    total, count = len(prompts), 0
    if total > 1 and sampling.batch_size > 1 and not session.model.info.can_batch:
        say(f"one prompt after the other: the family {session.model.info.family} cannot be continued in batches here")

    def tell(number: int, found: Completion) -> None:
        nonlocal count
        keep(number, found)
        count += 1
        if total > sampling.batch_size and sys.stderr.isatty():
            print(f"\r{count} of {total} answered", end="" if count < total else "\n", file=sys.stderr, flush=True)

    return complete_all(session, prompts, sampling, tell)


def show(session: Session, asked: list[Prompt], found: list[Completion], *, as_json: bool, printed: bool) -> None:
    """Print texts, of several prompts each under its number, or the JSON object: of one prompt its answer's fields."""
    if as_json and len(found) == 1:
        emit(found[0], backend=session.backend.name)
    elif as_json:
        emit_object({"completions": [asdict(answer) for answer in found], "backend": session.backend.name})
    elif not printed and len(found) == 1:
        print(printable(found[0].text))
    elif not printed:
        for number, (one, answer) in enumerate(zip(asked, found, strict=True), start=1):
            begun = " ".join(one.last.split())
            begun = begun if len(begun) <= 70 else begun[:67] + "..."
            print(printable(f"[{number}] {begun}\n{answer.text}\n"))


def open_checked(model: str, *, adapter: list[str] | None, backend: str, dtype: str, quantization: str) -> Session:
    """Return a session; what is misspelt is said before anything is loaded."""
    from shared.sessions import open_session

    check_choice("--dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    check_backend(backend)
    return open_session(model, adapter=adapter, backend=backend, dtype=dtype, quantization=quantization, note=say)
