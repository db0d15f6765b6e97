"""The hashes of an adapter's tensor files, as our notes in its config keep them; PEFT and mlx-lm write none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.adapters.names import TENSOR_FILES
from shared.adapters.schema import CONFIG_FILE
from shared.errors import AdapterError
from shared.folder import sha256


def hashes_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor file of an adapter folder."""
    return {name: sha256(folder / name) for name in TENSOR_FILES if (folder / name).is_file()}


def noted(notes: Any) -> Mapping[str, Any]:
    """Return the hashes that our notes have, empty where there are none."""
    found = notes.get("sha256") if isinstance(notes, dict) else None
    return found if isinstance(found, dict) else {}


def check_hashes(folder: Path, notes: Any) -> None:
    """Raise AdapterError where a tensor file is another than the notes say."""
    hashes = noted(notes)
    for name, found in hashes_of(folder).items() if hashes else ():
        if hashes.get(name, found) != found:
            raise AdapterError(
                f"{folder / name} is damaged or was changed: {CONFIG_FILE} notes another SHA-256", code="E311",
                fix=f'copy or train the adapter again; if the change is yours, remove "sha256" from {CONFIG_FILE}',
            )  # fmt: skip
