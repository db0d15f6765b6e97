"""The entry point: nothing but the standard library until Ctrl-C has one line for an answer."""

from __future__ import annotations

import sys
from contextlib import suppress


def main() -> None:
    """Run the command line; stopped while it is loading, say so."""
    try:
        from mlxlora.cli.main import main as run

        run()
    except KeyboardInterrupt:
        with suppress(OSError):
            print("stopped", file=sys.stderr)
        sys.exit(130)
