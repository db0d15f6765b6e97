"""`mlxlora chat`: a conversation in the terminal, or with the lines of a pipe."""

from __future__ import annotations

import sys
from contextlib import closing
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated

import typer

from mlxlora.cli.generating import open_checked
from mlxlora.cli.options import Adapted, AdapterPath, BackendName, Debug, Dtype, Json, Quantization
from mlxlora.cli.output import emit_object, printable, say
from mlxlora.cli.sampling import FROM_OPTIONS, Settings, check_settings, takes_sampling

if TYPE_CHECKING:
    from shared.generation.answers import Completion
    from shared.jobs.chat import Chat

System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="What the model is told beforehand.")]
COMMANDS = """/reset          forget what was said
/system TEXT    another system prompt, without TEXT none; begins anew
/exit           leave, as Ctrl-D does
\"\"\"             begins and ends a message of several lines
Ctrl-C          breaks an answer off"""


@takes_sampling(max_tokens=1024, temperature=0.7, top_p=0.95, seed=0)
def chat(
    model: Adapted,
    adapter: AdapterPath = None,
    system: System = None,
    sampling: Settings = FROM_OPTIONS,
    backend: BackendName = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Talk with a model; lines come from the terminal or from a pipe."""
    from shared.generation.config import chat_settings
    from shared.jobs.chat import Chat
    from shared.sessions import sampling_for, tell_lost

    settings = chat_settings(sampling)
    check_settings(settings)
    session = open_checked(model, adapter=adapter, backend=backend, dtype=dtype, quantization=quantization)
    talk = Chat(session, sampling_for(session, **settings), system)
    if isinstance(sys.stdin, TextIOWrapper):  # a byte that is not UTF-8 costs its line only
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if sys.stdin.isatty():
        import readline  # noqa: F401  (arrows and history for input())

        print(f"{session.folder.name} on {session.backend.name}; /help lists the commands", file=sys.stderr)
    if system:
        tell_lost(session, [system], say)
    converse(talk)
    if as_json:
        emit_object({"messages": talk.messages, "system": talk.system, "backend": session.backend.name})


def converse(talk: Chat) -> None:
    """Read messages and commands and answer them, until the end of the input or /exit."""
    while (line := read_message()) is not None:
        if not line.strip():
            continue
        if not line.startswith("/") or "\n" in line:
            answer(talk, line)
        elif obey(talk, line.strip()):
            return


def read_message() -> str | None:
    """Return the next message, None at the end: a line, or the lines between two that hold three quotes."""
    line = read_line("> ")
    if line is None or line.strip() != '"""':
        return line
    lines: list[str] = []
    while (line := read_line(". ")) is not None and line.strip() != '"""':
        lines.append(line)
    return "\n".join(lines)


def read_line(sign: str) -> str | None:
    """Return the next line, None at the end; the sign is shown on a terminal. Ctrl-C begins the line anew."""
    while True:
        try:
            line = f"{input(sign)}\n" if sys.stdin.isatty() else sys.stdin.readline()
            line.encode("utf-8")
            return line.rstrip("\r\n") if line else None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\nCtrl-D or /exit leaves", file=sys.stderr)
        except EOFError:
            print()
            return None
        except UnicodeEncodeError:
            print("that line is not UTF-8: it is passed over", file=sys.stderr)


def obey(talk: Chat, line: str) -> bool:
    """Do what a command says; return whether to leave."""
    from shared.errors import DataError, did_you_mean

    name, _, rest = line.partition(" ")
    if name in ("/exit", "/quit", "/bye"):
        return True
    if name == "/reset":
        talk.reset()
        say("begun anew")
    elif name == "/system":
        try:
            talk.set_system(rest.strip() or None)
            say("begun anew with that system prompt" if rest.strip() else "begun anew without a system prompt")
        except DataError as error:
            print(f"error {error.code}: {error}", file=sys.stderr)
    elif name in ("/help", "/?"):
        print(COMMANDS, file=sys.stderr)
    else:
        known = ("/reset", "/system", "/exit", "/help")
        print(f"unknown command {name}; {did_you_mean(name, known)}", file=sys.stderr)
    return False


def answer(talk: Chat, message: str) -> None:
    """Print the answer to a message as it comes; Ctrl-C breaks it off."""
    from shared.errors import DataError
    from shared.sessions import tell_lost

    end = "\n"
    try:
        tell_lost(talk.session, [message], say)
        with closing(talk.stream(message)) as pieces:
            for piece in pieces:
                print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        end = " [broken off]\n"
    except DataError as error:
        if not sys.stdin.isatty():
            raise
        print(f"error {error.code}: {error}", file=sys.stderr)
        return
    print(end, end="", flush=True)
    if talk.last and talk.last.finish_reason == "length":
        say(f"cut off behind {len(talk.last.tokens)} tokens{why_cut(talk, talk.last)}")


def why_cut(talk: Chat, last: Completion) -> str:
    """Return why an answer has no more tokens, and what to do."""
    from shared.sessions import most_tokens

    most = most_tokens(talk.session)
    if most is not None and last.prompt_tokens + len(last.tokens) >= most:
        return f": the model's {most} positions are full; /reset begins anew"
    return "; --max-tokens allows for more"
