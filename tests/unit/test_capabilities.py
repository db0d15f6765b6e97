"""The matrix of scheme x backend: probed, printed, and the README's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from shared.capabilities import Cell, current_table, examine, examine_schemes, shorten, summarize, table, tell
from shared.registry import BACKENDS, find_backend
from shared.schemes import named_schemes
from shared.tensors import from_float32, to_float32
from shared.types import Scheme
from torch_backend.backend import TorchBackend

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
START, END = "<!-- capabilities: made by shared/capabilities.py -->\n", "<!-- end of capabilities -->"


def test_every_format_that_a_config_names_trains_on_both_backends():
    plain = {name for name, scheme in named_schemes().items() if not scheme.solver}
    for name in BACKENDS:
        cells = examine_schemes(find_backend(name))
        assert {cell.scheme for cell in cells} == plain
        assert [cell for cell in cells if cell.verdict != "trains"] == []


def test_the_table_of_the_readme_is_what_the_probes_find():
    """To write it anew: python -c "from shared.capabilities import current_table; print(current_table())"."""
    assert README.read_text().partition(START)[2].partition(END)[0] == "\n" + current_table() + "\n"


def test_other_values_and_other_gradients_are_found_out():
    class Rounds(TorchBackend):
        """Decodes to bfloat16."""

        def decode(self, packed):
            return from_float32(to_float32(from_float32(to_float32(super().decode(packed)), "BF16")), "F32")

    class Turns(TorchBackend):
        """Gives gradients with another sign."""

        def input_gradient(self, packed, grad):
            return -super().input_gradient(packed, grad)

    scheme = Scheme("nf4", 4, 64)
    assert examine(TorchBackend(), scheme).verdict == "trains"
    assert examine(Rounds(), scheme) == Cell("nf4", "torch", "refused", "its values are not those of the codec")
    found = examine(Turns(), scheme)
    assert (found.verdict, found.reason) == ("decodes", "the gradient of its input is off by 2e+00")


def test_cells_are_told_in_few_words():
    good, bad = Cell("affine-4bit-g32", "mlx", "trains", ""), Cell("affine-4bit-g64", "mlx", "refused", "no kernel")
    assert tell([good, good, bad]) == "trains; affine-4bit-g64 refused: no kernel"
    assert tell([bad]) == "refused: no kernel"
    assert summarize([good, bad]) == "trains affine-4bit-g32; refused: affine-4bit-g64 (no kernel)"
    assert shorten(["nf4", "nf4-dq", "ternary-g32", "ternary-g128"]) == ["nf4", "nf4-dq", "ternary-g{32,128}"]
    rows = table({"mlx": [Cell(str(s), "mlx", "trains", "") for s in named_schemes().values()]}).splitlines()
    assert rows[0] == "| quantization | bits per weight | MLX |"
    assert np.unique([row.count("|") for row in rows]).tolist() == [4]


def test_every_test_that_the_page_on_formats_names_is_there():
    text, file = (ROOT / "docs/formats.md").read_text(), ROOT
    names = re.findall(r"`((?:tests/[\w/]+\.py|…)?(?:::\w+)?)`", text)
    assert len(names) > 10
    for name in filter(None, names):
        path, _, function = name.partition("::")
        file = file if path == "…" else ROOT / path
        assert file.is_file(), name
        assert not function or f"def {function}(" in file.read_text(), name
