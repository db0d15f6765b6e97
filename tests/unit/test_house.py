"""The house rules of the architecture, checked on the syntax tree of every file: nothing is imported or run."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from shared import errors
from shared.catalogue import CATALOGUE, page

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shared", "mlxlora", "torch_backend")
# Files that one backend has and the other has no use for.
UNMIRRORED = {
    "elementwise.py": "functions that MLX computes slowly or inexactly on a CPU: torch's are better",
    "norms.py": "what MLX has as one operation",
    "rotary.py": "what MLX composes of many operations on a CPU: torch's zoo has a table already",
    "kernels.py": "triton: MLX decodes its own format, and has kernels of its own for it",
    "offload.py": "activations in host memory: with unified memory there is no other memory to move them to",
}
MAX_FILE, MAX_FUNCTION = 420, 40
FRAMEWORKS = {"mlx", "mlx_lm", "torch", "triton", "transformers", "accelerate", "bitsandbytes", "optimum", "peft"}
GROUND = {
    "errors", "catalogue", "faults", "masking", "types", "protocols", "sections", "problems", "schemes", "config",
    "registry",
}  # fmt: skip
FIRST = {
    "seeds",
    "schedules",
    "tensors",
    "folder",
    "experts",
    "families",
    "hub",
    "strict",
    "threads",
    "reference",
    "config_file",
    "importing",
    "durable",
    "optimizers",
    "gradients",
}
FIRST_FOLDERS = {"data", "objectives", "quant", "adapters", "convert", "generation", "evaluating"}
# Third-party packages per floor: at the top of a file, and inside functions.
OPEN = {
    0: {"numpy", "pydantic"},
    1: {"numpy", "pydantic", "safetensors", "yaml", "jinja2"},
    2: {"numpy", "pydantic", "safetensors", "yaml", "jinja2", "psutil"},
    4: {"typer", "rich", "click", "numpy", "pydantic", "yaml"},
}
LAZY = {
    0: set(),
    1: {"transformers", "huggingface_hub", "gguf", "pyarrow"},
    2: {"transformers", "huggingface_hub", "rich", "tensorboard", "trackio", "wandb", "mlflow"},
    4: {"psutil"},
}
OWN = {
    "mlxlora": {"mlx", "mlx_lm", "numpy", "psutil", "transformers", "safetensors"},
    "torch_backend": {
        "torch",
        "triton",
        "transformers",
        "accelerate",
        "bitsandbytes",
        "optimum",
        "numpy",
        "psutil",
        "safetensors",
    },
}


@dataclass(frozen=True)
class Import:
    """One imported module, where, and whether it happens inside a function or for type checkers only."""

    module: str
    line: int
    lazy: bool
    typing: bool


def files_of(*packages: str) -> list[Path]:
    return sorted(file for package in packages for file in (ROOT / package).rglob("*.py"))


def name_of(file: Path) -> str:
    """Return a file's dotted name; a package's is that of its folder."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


OURS = {name_of(file): file for file in files_of(*PACKAGES)}


def imports_of(file: Path) -> Iterator[Import]:
    """Yield every import of a file; `from a import b` counts as a.b where that is a module of ours."""

    def walk(node: ast.AST, *, lazy: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy, typing) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}:{child.lineno}: imports are written in full"
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    yield Import(whole if whole in OURS else child.module, child.lineno, lazy, typing)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                guard = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, lazy=lazy or function, typing=typing or guard)

    return walk(tree_of(file), lazy=False, typing=False)


def floor_of(module: str) -> int:
    """Return the floor a module of ours lives on."""
    package, *rest = module.split(".")
    if package == "shared":
        if not rest or (rest[0] in GROUND and len(rest) == 1):
            return 0
        return 1 if rest[0] in FIRST | FIRST_FOLDERS else 2
    front = package == "mlxlora" and (not rest or rest[0] in ("cli", "__main__"))
    return 4 if front else 3


def is_allowed(importer: str, found: Import) -> bool:
    """Return whether a file may import this: own modules downwards only, others as its floor allows."""
    floor, root, package = floor_of(importer), found.module.split(".")[0], importer.split(".")[0]
    if root in sys.stdlib_module_names:
        return True
    if root in PACKAGES:
        if floor == 3:
            return root in ("shared", package) and floor_of(found.module) <= 3
        if floor == 4:
            return floor_of(found.module) != 3  # backends are found by name, in shared.registry
        return floor_of(found.module) <= floor
    if floor == 3:
        return root in OWN[package]
    return root in OPEN[floor] or ((found.lazy or found.typing) and root in LAZY[floor])


def functions_of(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree_of(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def place(file: Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


def test_imports_only_go_down():
    wrong = [
        f"{place(file, found.line)}: floor {floor_of(name)} imports {found.module}{' (lazily)' if found.lazy else ''}"
        for name, file in OURS.items()
        for found in imports_of(file)
        if not is_allowed(name, found)
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_imports_go_round_in_circles():
    graph = {
        name: {found.module for found in imports_of(file) if found.module in OURS and not found.typing}
        for name, file in OURS.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for inner in sorted(graph[name] - {name}):
                visit(inner, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_importing_package_and_command_line_loads_no_framework():
    code = "import sys, mlxlora, mlxlora.cli.main; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not FRAMEWORKS & set(found.stdout.split())


def test_the_backends_are_mirrors_file_by_file():
    ours, theirs = ({file.name for file in (ROOT / package).glob("*.py")} for package in PACKAGES[1:])
    assert ours ^ theirs == {"__main__.py", *UNMIRRORED}


def outline(file: Path) -> list[str]:
    """Return the top-level definitions in order, without the backend's name in them."""
    names = []
    for node in tree_of(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [re.sub("mlx|torch", "", name, flags=re.IGNORECASE) for name in names]


@pytest.mark.parametrize(
    "name", sorted(file.stem for file in (ROOT / "mlxlora").glob("[a-z]*.py") if file.name not in UNMIRRORED)
)
def test_what_both_backends_define_stands_in_the_same_order(name):
    ours, theirs = (outline(ROOT / package / f"{name}.py") for package in PACKAGES[1:])
    both = set(ours) & set(theirs)
    assert [entry for entry in ours if entry in both] == [entry for entry in theirs if entry in both]
    assert both, "two mirrored files have something in common"


def test_no_file_is_longer_than_one_question():
    long = {name: count for name, file in OURS.items() if (count := len(file.read_text().splitlines())) > MAX_FILE}
    assert not long


def test_no_function_is_longer_than_a_screen():
    long = [
        f"{place(file, node.lineno)} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for file in OURS.values()
        for node in functions_of(file)
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]
    assert not long, "\n" + "\n".join(long)


def is_dangerous(node: ast.AST) -> bool:
    """Return whether a node can run code from a file: pickle, torch.load, allow_pickle, eval, exec, remote code."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        return bool(
            {name.split(".")[0] for name in names} & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
        )
    if isinstance(node, ast.keyword):
        switched_on = not (isinstance(node.value, ast.Constant) and node.value.value is False)
        return node.arg in ("allow_pickle", "trust_remote_code", "shell") and switched_on
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called.endswith(("extractall", "unpack_archive")):  # archives can write anywhere
            return True
        loads = ("np.load", "torch.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load")
        return called in ("eval", "exec", "os.system", *loads)
    return False


def test_nothing_can_run_code_from_a_file():
    wrong = [
        place(file, getattr(node, "lineno", 0))
        for file in files_of(*PACKAGES, "scripts")
        for node in ast.walk(tree_of(file))
        if is_dangerous(node)
    ]
    assert not wrong


IMPORTING = {  # where a module is imported by a name that is made while the program runs, and who gives the name
    "shared/registry.py": "our own tables, and what a user's config or environment names",
    "mlxlora/loading.py": "a family of mlx-lm's",
}


def test_modules_are_imported_by_name_in_few_places():
    found = {
        file.relative_to(ROOT).as_posix()
        for file in files_of(*PACKAGES)
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Attribute | ast.Name)
        and "import_module" in (getattr(node, "attr", ""), getattr(node, "id", ""))
    }
    assert found == set(IMPORTING)


def test_no_test_replaces_our_code_or_a_framework():
    """No mocks: a tiny real thing stands in their place."""
    wrong = [entry for file in files_of("tests") for entry in replacements(file)]
    assert not wrong, "\n" + "\n".join(wrong)


def replacements(file: Path) -> Iterator[str]:
    """Yield where a test imports a mock library, or patches a part of our packages or a framework."""
    kept = {*PACKAGES, *FRAMEWORKS}
    origins: dict[str, str] = {}  # name in the file -> dotted name of what it stands for
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            origins |= {alias.asname or alias.name: prefix + alias.name for alias in node.names}
    if any({"mock", "pytest_mock"} & set(origin.split(".")) for origin in origins.values()):
        yield f"{place(file, 1)}: imports a mock library"
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Call) and node.args and re.search(r"(patch|mocker)\w*\.\w+$", ast.unparse(node.func)):
            target = ast.unparse(node.args[0]).strip("'\"")
            origin = origins.get(target.split(".")[0], target)
            if origin.split(".")[0] in kept:
                yield f"{place(file, node.lineno)}: replaces a part of {origin}"


def test_no_backend_has_a_number_of_its_own_as_a_default():
    """Every default lives in shared/config.py."""
    wrong = []
    for file in files_of(*PACKAGES[1:]):
        if floor_of(name_of(file)) != 3:
            continue
        for node in functions_of(file):
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                value = getattr(default.operand if isinstance(default, ast.UnaryOp) else default, "value", None)
                if isinstance(value, int | float) and not isinstance(value, bool) and value not in (0, 1):
                    wrong.append(f"{place(file, node.lineno)} {node.name}: default {value}")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("backend", ["mlxlora", "torch_backend"])
def test_one_training_step_is_five_files_and_under_900_lines(backend):
    """The five files of docs/one-step.md; its table says how long each is."""
    zoo = {"mlxlora": "mlx_lm.models.llama", "torch_backend": "transformers.models.llama.modeling_llama"}[backend]
    found = importlib.util.find_spec(zoo)
    assert found is not None
    assert found.origin is not None
    ours = ["shared/loop.py", "shared/data/batch.py", f"{backend}/trainer.py", f"{backend}/adapters.py"]
    lengths = [len(Path(file).read_text().splitlines()) for file in [*(ROOT / name for name in ours), found.origin]]
    assert sum(lengths) < 900
    assert f"**{sum(lengths)}**" in (ROOT / "docs/one-step.md").read_text()


def raised_codes() -> Iterator[tuple[str, type[errors.MlxloraError], Any]]:
    """Yield (place, class, code) of every error of ours that is made; None where the code is another error's."""
    for file in OURS.values():
        for node in (found for found in ast.walk(tree_of(file)) if isinstance(found, ast.Call)):
            kind = getattr(errors, ast.unparse(node.func), None)
            if isinstance(kind, type) and issubclass(kind, errors.MlxloraError):
                given = next((word.value for word in node.keywords if word.arg == "code"), ast.Constant(kind.code))
                yield place(file, node.lineno), kind, given.value if isinstance(given, ast.Constant) else None


def test_every_error_has_a_code_of_its_exit_code_in_the_catalogue():
    wrong = [
        f"{where}: {kind.__name__} with code {code}"
        for where, kind, code in raised_codes()
        if code is not None and (code not in CATALOGUE or code[1] not in (str(kind.exit_code), "8"))
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_code_of_the_catalogue_is_used_and_has_its_line_in_the_page():
    used = {code for *_, code in raised_codes()} | {"E100", "E313"}  # what nobody raises, what a subclass does
    assert used - {None} == set(CATALOGUE)
    assert (ROOT / "docs/errors.md").read_text() == page()


def test_every_class_of_errors_has_a_code_for_those_raised_without_one():
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert not [kind.__name__ for kind in classes if vars(kind).get("code") not in CATALOGUE]


def test_every_row_of_the_fault_matrix_has_a_test_that_exists_or_a_reason():
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \|(.*)$", text, re.MULTILINE))
    assert sorted(map(int, rows)) == list(range(1, 43))
    known = {node.name for file in files_of("tests") for node in functions_of(file)}
    for number, row in rows.items():
        named = re.findall(r"`(test_\w+)`", row)
        assert set(named) <= known, f"row {number}"
        assert named or "cannot happen" in row, f"row {number} proves nothing"
