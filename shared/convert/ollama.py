"""A Modelfile: the GGUF file, the chat template in Ollama's language, end tokens and sampling settings.

A chat template is a program. Its text around the turns is found by rendering conversations of marked messages, and
taken only if putting it together again gives the program's own output on further conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.data.tokenize import Tokenizer, load_tokenizer
from shared.errors import DataError
from shared.folder import ModelFolder, end_tokens, read_json

SETTINGS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
MARKS = {"system": "SYSTEMMARK", "user": "USERMARK", "assistant": "ANSWERMARK"}
Messages = list[dict[str, Any]]
NO_TEMPLATE = "the chat template does not reduce to text around turns: the Modelfile leaves it to Ollama's own guess"
NO_SYSTEM = "the Modelfile's template leaves out system messages: the model's own joins them with the user's"


@dataclass(frozen=True)
class Turns:
    """The text around every turn; `head` opens a conversation that has no system message."""

    head: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    ask: str  # what the assistant's next answer follows

    def render(self, messages: Messages) -> str:
        """Return a conversation as Ollama will."""
        has_system = messages[0]["role"] == "system"
        text = "" if has_system else self.head
        for message in messages:
            around = getattr(self, message["role"])
            text += around[0] + message["content"] + around[1]
        return text + self.ask


def write_modelfile(folder: ModelFolder, staged: Path, *, model: str) -> tuple[str, ...]:
    """Write the Modelfile beside a GGUF file, and return notes."""
    tokenizer = load_tokenizer(folder.path)
    lines, notes = [f"FROM ./{model}"], ()
    if tokenizer.template is not None:
        turns = find_turns(tokenizer)
        if turns is None or '"""' in go_template(turns):
            notes = (NO_TEMPLATE,)
        else:
            notes = () if turns.system else (NO_SYSTEM,)
            lines.append(f'TEMPLATE """{go_template(turns)}"""')
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    for token in end_tokens(folder.path, tokenizer_eos=tokenizer.eos):
        text = tokenizer.inner.convert_ids_to_tokens(token)
        if text and '"' not in text:
            lines.append(f'PARAMETER stop "{text}"')
    lines += parameters(folder)
    (staged / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return notes


def parameters(folder: ModelFolder) -> list[str]:
    """Return the sampling settings of generation_config.json as Modelfile lines."""
    file = folder.path / "generation_config.json"
    found = read_json(file) if file.is_file() else {}
    if found.get("do_sample") is False:
        return ["PARAMETER temperature 0"]
    return [
        f"PARAMETER {own} {found[key]}"
        for key, own in SETTINGS.items()
        if isinstance(found.get(key), int | float) and not isinstance(found[key], bool)
    ]


def find_turns(tokenizer: Tokenizer) -> Turns | None:
    """Return the text around the turns of a chat template, None where that is not all it does."""
    try:
        turns = guess_turns(tokenizer)
        if turns is None:
            return None
        roles = [("user",), ("user", "assistant", "user"), ("user", "assistant", "user", "assistant", "user")]
        if turns.system:
            roles += [("system", *some) for some in roles]
        same = all(turns.render(talk(some)) == shown(tokenizer, talk(some), ask=True) for some in roles)
    except DataError:
        return None
    return turns if same else None


def talk(roles: Sequence[str]) -> Messages:
    """Return a conversation with a different text in every turn."""
    return [{"role": role, "content": f"{role} says:\n  {number} \u00e9!"} for number, role in enumerate(roles)]


def guess_turns(tokenizer: Tokenizer) -> Turns | None:
    """Return the text around the turns, from conversations of marked messages; None where a mark is gone."""
    one, two = marked(tokenizer, "user"), marked(tokenizer, "user", "assistant", "user")
    answered = marked(tokenizer, "user", "assistant")
    if one is None or two is None or answered is None:
        return None
    (before, user_end), closing = one, answered[-1]
    if not two[1].startswith(user_end) or not two[2].startswith(closing):
        return None
    opening, user_start = two[1].removeprefix(user_end), two[2].removeprefix(closing)
    ask = shown(tokenizer, [message("user")], ask=True).removeprefix(before + MARKS["user"] + user_end)
    return Turns(
        head=before.removesuffix(user_start),
        system=guess_system(tokenizer, user_start),
        user=(user_start, user_end),
        assistant=(opening, closing),
        ask=ask,
    )


def guess_system(tokenizer: Tokenizer, user_start: str) -> tuple[str, str] | None:
    """Return the text around a system message, None where the template has no place of its own for it."""
    try:
        found = marked(tokenizer, "system", "user")
    except DataError:
        return None
    if found is None or not found[1].endswith(user_start):
        return None
    return found[0], found[1].removesuffix(user_start)


def message(role: str) -> dict[str, Any]:
    """Return a marked message."""
    return {"role": role, "content": MARKS[role]}


def marked(tokenizer: Tokenizer, *roles: str) -> list[str] | None:
    """Return the text before, between and behind marked messages, None where a mark is not there once."""
    text, parts = shown(tokenizer, [message(role) for role in roles], ask=False), []
    for role in roles:
        before, mark, text = text.partition(MARKS[role])
        if not mark:
            return None
        parts.append(before)
    return [*parts, text]


def shown(tokenizer: Tokenizer, messages: Messages, *, ask: bool) -> str:
    """Return a conversation's text, without the start token that llama.cpp adds by itself."""
    text = tokenizer.chat_prompt(messages) if ask else tokenizer.chat(messages).text
    start, first = tokenizer.inner.bos_token, tokenizer.encode("a")
    adds = bool(start) and len(first) > 1 and first[0] == tokenizer.inner.bos_token_id
    return text.removeprefix(start) if adds else text


def go_template(turns: Turns) -> str:
    """Return the template in Ollama's language (Go's text/template).

    >>> print(go_template(Turns("", None, ("U:", "\\n"), ("A:", "\\n"), "A:")))
    {{ range .Messages }}{{ if eq .Role "user" }}U:{{ .Content }}
    {{ else if eq .Role "assistant" }}A:{{ .Content }}
    {{ end }}{{ end }}A:
    """
    roles = [("user", turns.user), ("assistant", turns.assistant)]
    roles = [("system", turns.system), *roles] if turns.system else roles
    branches = [
        f'{{{{ if eq .Role "{role}" }}}}{quoted(around[0])}{{{{ .Content }}}}{quoted(around[1])}'
        for role, around in roles
    ]
    body = "{{ else if".join(branch if n == 0 else branch.removeprefix("{{ if") for n, branch in enumerate(branches))
    head = f"{{{{ if not .System }}}}{quoted(turns.head)}{{{{ end }}}}" if turns.head else ""
    return f"{head}{{{{ range .Messages }}}}{body}{{{{ end }}}}{{{{ end }}}}{quoted(turns.ask)}"


def quoted(text: str) -> str:
    """Return text such that the template language takes it as it is.

    >>> quoted("a {{ b")
    'a {{ "{{" }} b'
    """
    return text.replace("{{", '{{ "{{" }}')
