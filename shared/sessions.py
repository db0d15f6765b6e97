"""A base with an adapter, opened for reading: what `evaluate`, `generate` and `chat` work with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.adapters.bases import check_base, other_weights
from shared.adapters.folder import Adapter, check_copies, check_fit
from shared.config import EvaluationConfig
from shared.convert.merge import read_weighted
from shared.data.layout import choose_layout
from shared.data.notices import lost_in
from shared.data.prompts import Prompt
from shared.data.rows import Row, find_data, find_split, read_rows
from shared.data.tokenize import Tokenizer, load_tokenizer, tokenize_rows
from shared.errors import ConfigError, DataError, did_you_mean
from shared.evaluating.exams import Graded, ask, make_questions
from shared.evaluating.loss import Evaluation, evaluate_examples
from shared.folder import ModelFolder, end_tokens, find_folder, open_folder
from shared.generation.answers import Answer, Completion
from shared.generation.config import read_settings
from shared.protocols import Backend, Model, Rows
from shared.registry import find_backend
from shared.running.run_folder import hash_files, joint_hash
from shared.schemes import parse_scheme
from shared.strict import beyond_positions, check_length
from shared.types import Sampling, Token

DTYPES = ("auto", "float32", "bfloat16", "float16")
HASHED_BYTES = 2**30  # hashing a larger base would take longer than a short answer
Note = Callable[[str], None]


@dataclass(frozen=True)
class Session:
    """A loaded model, its tokenizer, its adapter if any, and where it runs."""

    model: Model
    tokenizer: Tokenizer
    adapter: Adapter | None
    backend: Backend
    folder: Path


def open_session(
    model: str, *, adapter: str | Path | Sequence[str] | None, backend: str, dtype: str = "auto",
    quantization: str = "auto", device: str = "auto", note: Note = lambda text: None,
) -> Session:  # fmt: skip
    """Return a session; raises MlxloraError subclasses.

    adapter: a folder, or several as "folder=weight", which are added.
    dtype auto: bfloat16 on a GPU, float32 on a CPU. quantization auto: as the adapter was trained.
    """
    if dtype not in DTYPES:
        raise ConfigError(f'dtype: unknown value "{dtype}"', fix=did_you_mean(dtype, DTYPES))
    if quantization != "auto":
        parse_scheme(quantization, option="--quantization")
    found = read_weighted([str(adapter)] if isinstance(adapter, str | Path) else adapter) if adapter else None
    folder = find_folder(model)
    base = open_folder(folder)
    if found is not None:
        check_base(found, base)
    tokenizer = load_tokenizer(folder)
    engine = find_backend(backend)
    if dtype == "auto":
        dtype = "bfloat16" if engine.probe().device == "gpu" and device != "cpu" else "float32"
    scheme = parse_scheme(choose_quantization(quantization, found, already=bool(base.schemes), note=note))
    loaded = engine.load_model(
        folder, dtype=dtype, quantization=scheme, recompute=False, device=None if device == "auto" else device
    )
    if found is not None:
        check_fit(found, loaded.info)
        check_copies(found, base)
    for text in (*loaded.info.notes, *differences(found, base, dtype=dtype)):
        note(text)
    if found is not None:
        loaded.attach(found.spec)
        loaded.load_tensors("adapter", found.tensors)
    return Session(loaded, tokenizer, found, engine, folder)


def differences(adapter: Adapter | None, base: ModelFolder, *, dtype: str) -> Iterator[str]:
    """Yield what differs between how an adapter was trained and how it is used now."""
    if adapter is None:
        return
    trained = adapter.notes.get("dtype", dtype)
    if trained != dtype:
        yield f"the adapter was trained in {trained}, this is {dtype}; --dtype {trained} gives the training's numbers"
    if sum(file.stat().st_size for file in base.files) <= HASHED_BYTES:
        yield from other_base(adapter, base)


def other_base(adapter: Adapter, base: ModelFolder) -> Iterator[str]:
    """Yield that a base is another than the adapter was trained on, as far as its notes say; reads the whole base."""
    files = [*base.files, base.path / "config.json"]
    if "base" in adapter.notes:
        yield from other_weights(adapter, joint_hash(hash_files(files).result()))


def choose_quantization(asked: str, adapter: Adapter | None, *, already: bool, note: Note) -> str:
    """Return the scheme to load the base with; follows the adapter's training unless told otherwise."""
    if asked != "auto":
        return asked
    trained = str(adapter.notes.get("quantization", "none")) if adapter else "none"
    if trained != "none" and not already:
        note(f"base quantized to {trained}, as the adapter was trained; --quantization none keeps it whole")
        return trained
    return "none"


def find_rows(
    data: str, *, split: str | None = None, columns: Mapping[Any, str] | None = None
) -> tuple[list[Row], str]:
    """Return the rows of a file, or of a folder's split (valid, else test, else train), and the file's name.

    columns: our key -> the file's.
    """
    files = find_split(find_data(data), split)
    return read_rows(*files, columns=columns), files[0].name


def evaluate_rows(
    session: Session, rows: list[Row], *, max_length: int = 2048, train_on: str = "completion",
    note: Note = lambda text: None,
) -> Evaluation:  # fmt: skip
    """Return the loss on rows: nats per supervised token."""
    examples = tokenize_rows(rows, session.tokenizer, train_on=train_on, max_length=max_length)
    longest = max(examples, key=lambda example: len(example.tokens))
    check_length(session.model.info, len(longest.tokens), what=longest.source)
    if text := beyond_positions(len(longest.tokens), session.model.info.max_positions):
        note(text)
    layout = choose_layout(session.model.info, packing="auto", micro_tokens=None)
    return evaluate_examples(session.model, examples, layout)


def answer_rows(
    session: Session, rows: list[Row], *, number: int, max_tokens: int | None = None, note: Note = lambda text: None
) -> list[Graded]:
    """Return the greedy answers to the first prompts of rows, with their scores; raises DataError for rows of text.

    max_tokens: of an answer; None: as evaluations of a run have it.
    """
    most = EvaluationConfig().max_tokens if max_tokens is None else max_tokens
    questions = make_questions(rows[:number], session.tokenizer)
    if long := sum(question.num_wanted > most for question in questions):
        note(f"{long} of {len(questions)} answers of the rows have more than {most} tokens, so they are never matched")
    return ask(session.model, questions, session.tokenizer, max_tokens=most)


def prompt_ids(
    session: Session, prompt: str | Prompt, *, chat: bool | None, note: Note = lambda text: None
) -> list[int]:
    """Return the ids of a prompt.

    chat: wrap it as a user's message in the chat template; None: if the adapter was trained on messages. A conversation
    always is.
    """
    if isinstance(prompt, Prompt) and prompt.messages:
        text = session.tokenizer.chat_prompt(list(prompt.messages), tools=prompt.tools)
        return session.tokenizer.encode(text, special=False)
    prompt = prompt.text if isinstance(prompt, Prompt) else prompt
    if chat is None:
        chat = bool(session.adapter and session.adapter.notes.get("rows") == "messages")
        if chat:
            note("prompt taken as a user's message, as the adapter was trained on messages; --raw takes it as it is")
    if not chat:
        ids = session.tokenizer.encode(prompt)
        if (
            len(ids) > 1
            and ids[-1] == session.tokenizer.eos
            and session.tokenizer.decode(ids) == session.tokenizer.decode(ids[:-1])
        ):
            ids = ids[:-1]  # a tokenizer that ends every text; a prompt goes on
    else:
        text = session.tokenizer.chat_prompt([{"role": "user", "content": prompt}])
        ids = session.tokenizer.encode(text, special=False)
    if not ids:
        raise DataError("the prompt is empty and the model has no start token", fix="give a prompt", code="E215")
    return ids


def tell_lost(session: Session, texts: Sequence[str], note: Note) -> None:
    """Say which characters of prompts do not reach the model, as its tokenizer drops them."""
    if lost := lost_in(texts, session.tokenizer):
        note(lost)


def most_tokens(session: Session) -> int | None:
    """Return how many tokens, prompt and answer together, the model takes; None: nobody says."""
    info = session.model.info
    return min((limit for limit in (info.max_positions, info.max_tokens) if limit is not None), default=None)


def check_room(session: Session, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Raise DataError for a prompt whose answer may need more positions than the model was made for."""
    most = session.model.info.max_positions
    for number, ids in enumerate(prompts, start=1):
        if most is not None and len(ids) + sampling.max_tokens > most:
            which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            fits = f"max_tokens {most - len(ids)}, or a shorter prompt" if len(ids) < most else "a shorter prompt"
            raise DataError(
                f"{which} has {len(ids)} tokens, with {sampling.max_tokens} of an answer more than the model has "
                f"positions: {most}",
                fix=fits,
                code="E215",
            )


def stream(session: Session, ids: Sequence[int], sampling: Sampling) -> Iterator[tuple[str, Token]]:
    """Yield (new text, token) as tokens come; text is held back while it may be half a character or a stop string."""
    answer = Answer(session.tokenizer.decode, sampling, len(ids))
    for _, piece, token in follow(session, [answer], [ids], sampling):
        yield piece, token


def follow(
    session: Session, answers: Sequence[Answer], prompts: Sequence[Sequence[int]], sampling: Sampling, *,
    rows: Rows | None = None,
) -> Iterator[tuple[Answer, str, Token]]:  # fmt: skip
    """Yield (answer, new text, token) of several prompts, in turns, and fill in their answers."""
    ended: set[int] = set()
    for token in session.model.generate(prompts, sampling, ended=ended, rows=rows):
        answer = answers[token.prompt]
        piece = answer.take(token)
        if answer.finish_reason:
            ended.add(token.prompt)
        yield answer, piece, token


def complete(session: Session, ids: Sequence[int], sampling: Sampling) -> Completion:
    """Return the whole continuation of a prompt."""
    return complete_all(session, [ids], sampling)[0]


def complete_all(
    session: Session, prompts: Sequence[Sequence[int]], sampling: Sampling,
    done: Callable[[int, Completion], None] = lambda number, found: None,
) -> list[Completion]:  # fmt: skip
    """Return the continuations of all prompts, `sampling.batch_size` of them computed together.

    done: called with a prompt's number and its continuation as soon as it is whole, in any order.
    """
    answers = [Answer(session.tokenizer.decode, sampling, len(ids), live=False) for ids in prompts]
    for answer, _, token in follow(session, answers, prompts, sampling):
        if answer.finish_reason:
            done(token.prompt, answer.completion())
    return [answer.completion() for answer in answers]


def sampling_for(session: Session, **values: Any) -> Sampling:
    """Return the sampling of a session, with the model's end tokens; values: settings of GenerationConfig.

    A stop string that is a control token of the model, such as "<|im_end|>", is one more end token.
    """
    settings = read_settings(values)
    control = {stop: session.tokenizer.special_id(stop) for stop in settings.stop}
    ends = end_tokens(session.folder, tokenizer_eos=session.tokenizer.eos)
    return Sampling(
        **settings.model_dump(exclude={"stop"}),
        stop_tokens=tuple(sorted({*ends, *(token for token in control.values() if token is not None)})),
        stop_strings=tuple(stop for stop, token in control.items() if token is None),
    )
