"""Big libraries are imported without their front, and without a garbage collector that finds nothing."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from shared.importing import collector_paused, defer_front, read_constant

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a package's name; its front says when it runs, and fails where BROKEN is a file beside it."""
    name = "front_of_a_house"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "import pathlib\nran = globals().get('ran', 0) + 1\n"
        "if (pathlib.Path(__file__).parent / 'BROKEN').exists():\n    raise ImportError('no such luck')\n"
        "__version__ = '3'\nfrom .room import chair\n"
    )
    (folder / "room.py").write_text("chair = object()\nTABLE = {'legs': 4}\nlegs = len(TABLE)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield folder
    for key in [key for key in sys.modules if key.split(".")[0] == name]:
        del sys.modules[key]


def test_a_submodule_is_imported_without_its_packages_front(package):
    defer_front(package.name)
    room = importlib.import_module(f"{package.name}.room")
    front = sys.modules[package.name]
    assert "ran" not in vars(front)
    assert front.chair is room.chair
    assert (front.ran, front.__version__, front.room) == (1, "3", room)
    assert importlib.import_module(package.name) is front


@pytest.mark.parametrize("name", ["chair", "__version__"])
def test_the_front_runs_when_a_name_of_it_is_asked_for(package, name):
    defer_front(package.name)
    found = getattr(sys.modules[package.name], name)
    assert found is getattr(sys.modules[package.name], name)
    assert sys.modules[package.name].ran == 1


def test_what_a_front_does_not_have_is_an_attribute_error(package):
    defer_front(package.name)
    front = sys.modules[package.name]
    with pytest.raises(AttributeError):
        front.__wrapped__  # noqa: B018
    assert "ran" not in vars(front)
    with pytest.raises(AttributeError):
        front.sofa  # noqa: B018


def test_a_front_that_fails_says_why_each_time_and_works_once_it_can(package):
    (package / "BROKEN").touch()
    defer_front(package.name)
    front = sys.modules[package.name]
    for _ in range(2):
        with pytest.raises(ImportError, match="no such luck"):
            front.chair  # noqa: B018
    (package / "BROKEN").unlink()
    assert front.chair is front.room.chair


def test_a_package_that_is_imported_already_stays_as_it_is(package):
    front = importlib.import_module(package.name)
    defer_front(package.name)
    assert sys.modules[package.name] is front
    assert front.ran == 1


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(ModuleNotFoundError, match="no_such_house"):
        defer_front("no_such_house")


def test_a_literal_is_read_without_importing_its_module(package):
    defer_front(package.name)
    assert read_constant(f"{package.name}.room", "TABLE") == {"legs": 4}
    assert f"{package.name}.room" not in sys.modules
    for name in ("SOFA", "chair", "legs"):
        with pytest.raises(LookupError):
            read_constant(f"{package.name}.room", name)


def test_mlx_lms_names_for_model_types_are_those_it_uses():
    from mlx_lm.utils import MODEL_REMAPPING

    assert read_constant("mlx_lm.utils", "MODEL_REMAPPING") == MODEL_REMAPPING


def test_mlx_lm_without_its_front_is_mlx_lm():
    """The same modules, and everything else once somebody asks; nothing of torch or transformers before."""
    code = (
        "import sys\nfrom mlxlora.backend import lend_blas\nlend_blas()\n"
        "from shared.importing import defer_front\ndefer_front('mlx_lm')\n"
        "from mlx_lm.models import llama\n"
        "assert not {'torch', 'transformers', 'mlx_lm.utils'} & set(sys.modules)\n"
        "import mlx_lm\nfrom mlx_lm import load\n"
        "from mlx_lm.utils import _get_classes, load as same\n"
        "assert load is same and mlx_lm.models.llama is llama and mlx_lm.__version__\n"
        "assert _get_classes({'model_type': 'mistral'})[0] is llama.Model\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_put_back_as_it_was(enabled):
    try:
        (gc.enable if enabled else gc.disable)()
        with suppress(KeyError), collector_paused():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_what_a_block_without_imports_makes_is_still_collected():
    before = gc.get_freeze_count()
    with collector_paused():
        pass
    assert gc.get_freeze_count() == before
