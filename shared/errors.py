"""Every error a user can meet: what is wrong and where, what was expected, what to do next.

Each type also is a standard error, and carries the exit code of the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from shared.masking import mask


class MlxloraError(Exception):
    """Return an error of at most three lines: `what`, what was `expected`, how to `fix` it."""

    exit_code = 1
    code = "E100"  # of shared/catalogue.py; a subclass has the one of its commonest kind

    def __init__(
        self, what: str, *, expected: str | None = None, fix: str | None = None, code: str | None = None
    ) -> None:
        self.what, self.expected, self.fix = what, expected, fix
        self.code = code or self.code
        super().__init__(self.render())

    def render(self) -> str:
        """Return the message, one line per part, newlines inside a part folded to spaces."""
        fix = self.fix or (None if self.expected else f"mlxlora explain {self.code}")
        parts = [("", self.what), ("expected: ", self.expected), ("fix: ", fix)]
        return "\n".join(f"{label}{printable(mask(' '.join(text.split())))}" for label, text in parts if text)


class ConfigError(MlxloraError, ValueError):
    """A setting or a command-line argument that cannot be used."""

    exit_code = 2
    code = "E200"


class DataError(MlxloraError, ValueError):
    """A data file or a row that cannot be used; the message names `file:line`."""

    exit_code = 2
    code = "E212"


class ModelError(MlxloraError, ValueError):
    """A base model that is missing, damaged, or of another shape than its config says."""

    exit_code = 3
    code = "E304"


class AdapterError(MlxloraError, ValueError):
    """An adapter that is missing, damaged, or does not fit the base."""

    exit_code = 3
    code = "E312"


class CheckpointError(MlxloraError, ValueError):
    """A checkpoint or run folder that is missing, damaged, or of another run."""

    exit_code = 3
    code = "E321"


class CapabilityError(MlxloraError, ImportError):
    """Something this machine, backend or version does not have; the fix says what to install."""

    exit_code = 4
    code = "E400"


class DivergedError(MlxloraError, ArithmeticError):
    """Training produced non-finite numbers several updates in a row."""

    exit_code = 5
    code = "E500"


class OutOfMemory(MlxloraError, MemoryError):
    """The device has no memory left for the smallest possible micro-batch."""

    exit_code = 6
    code = "E600"


class StorageError(MlxloraError, OSError):
    """The disk is full or a folder is not writable."""

    exit_code = 7
    code = "E700"


class Interrupted(MlxloraError):
    """A signal stopped the run after its state was saved; `exit_code` is 130 or 143."""

    code = "E800"

    def __init__(self, what: str, *, exit_code: int, fix: str | None = None) -> None:
        super().__init__(what, fix=fix)
        self.exit_code = exit_code


def printable(text: str) -> str:
    """Return a text that a terminal shows as it is, whatever a file or a row brought along; the middle of a long
    one is left out.

    >>> printable("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    short = text if len(text) <= 500 else f"{text[:350]} ... {text[-120:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "Insufficient Memory", "Unable to allocate", "bad_alloc", "[malloc",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, of whichever framework, says that memory has run out.

    >>> is_out_of_memory(RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"))
    True
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `did you mean "x"?` for the nearest known name, else the known names.

    >>> did_you_mean("learning_rat", ["lr", "learning_rate"])
    'did you mean "learning_rate"?'
    >>> did_you_mean("adamm", ["adam", "adamw", "sgd"])
    'did you mean "adam" or "adamw"?'
    >>> did_you_mean("zzz", ["b", "a"])
    'known: a, b'
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if not near:
        return f"known: {', '.join(names)}"
    alike = near if all(one.startswith(near[0]) and name.startswith(near[0]) for one in near) else near[:1]
    return "did you mean " + " or ".join(f'"{one}"' for one in alike) + "?"
