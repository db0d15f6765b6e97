"""mlxlora: fine-tune language models with MLX and with PyTorch from one recipe.

>>> import mlxlora
>>> result = mlxlora.train(model="path/or/hub-id", data="folder", train={"updates": 100})  # doctest: +SKIP

No framework is imported here; each function loads what it needs when it is called.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.callbacks import Callback
    from shared.config import RunConfig
    from shared.convert.adapters import Converted
    from shared.convert.merge import Merged
    from shared.convert.models import ModelResult
    from shared.convert.quantize import QuantizeResult
    from shared.errors import MlxloraError
    from shared.estimate.report import Report
    from shared.evaluating.loss import Evaluation
    from shared.jobs.chat import Chat
    from shared.jobs.doctor import Check
    from shared.jobs.fuse import FuseResult
    from shared.jobs.parity import ParityResult
    from shared.jobs.preview import Preview
    from shared.jobs.quickstart import QuickstartResult
    from shared.jobs.runs import Comparison, RunFacts
    from shared.jobs.sweep import SweepResult
    from shared.jobs.train import TrainResult
    from shared.measuring.bench import BenchResult
    from shared.sessions import Session

    Config = str | Path | Mapping[str, Any] | RunConfig  # a YAML file, its sections, or what load_config gave

__version__ = "0.1.0"
__all__ = [
    "MlxloraError",
    "bench",
    "chat",
    "compare",
    "convert",
    "doctor",
    "estimate",
    "evaluate",
    "fuse",
    "generate",
    "load_config",
    "merge",
    "parity",
    "preview",
    "quantize",
    "quickstart",
    "runs",
    "schema",
    "stream",
    "sweep",
    "train",
]  # fmt: skip

Adapters = str | Path | Sequence[str] | None  # a folder, or several as "folder=weight": their weighted sum
DEMO = Path(__file__).parent / "demo"
RECIPES = Path(__file__).parent / "recipes"


def _check_siblings() -> None:
    """Raise ImportError where another package shadows `shared` or `torch_backend`: the names are common."""
    root = Path(__file__).resolve().parent.parent
    for name in ("shared", "torch_backend"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != root / name:
            raise ImportError(
                f'mlxlora needs its own package "{name}" in {root}, but Python finds {found}; '
                "remove or rename the other one, or start Python elsewhere"
            )


_check_siblings()


def __getattr__(name: str) -> Any:
    """Return the class of all our errors, which is loaded when it is asked for."""
    if name != "MlxloraError":
        raise AttributeError(f'module "{__name__}" has no attribute "{name}"')
    from shared.errors import MlxloraError

    return MlxloraError


def __dir__() -> list[str]:
    """Return the names that are meant for users."""
    return [*__all__, "__version__"]


def load_config(config: Config | None = None, *, overrides: Sequence[str] = (), **values: Any) -> RunConfig:
    """Return a checked config: of a YAML file or a mapping of sections, with keyword values and then `key.sub=value`
    overrides on top.

    `data` may be a path alone. Raises ConfigError with the place and the nearest known name.
    """
    from shared.config import RunConfig
    from shared.config_file import build_config, merge
    from shared.config_file import load_config as load
    from shared.errors import ConfigError

    if isinstance(config, RunConfig):
        if not values and not overrides:
            return config
        config = config.model_dump(mode="json")
    if config is not None and not isinstance(config, str | Path | Mapping):
        raise ConfigError(f"config is {config!r}", expected="a path, or a mapping of sections")
    values = _with_path(values)
    if config is None or isinstance(config, Mapping):
        return build_config(merge(_with_path(config or {}), values), overrides=overrides)
    return load(Path(config), overrides=overrides, values=values)


def _with_path(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections in which `data` is one, too, where it is a path alone."""
    data = values.get("data")
    return {**values, "data": {"path": str(data)}} if isinstance(data, str | Path) else dict(values)


def train(
    config: Config | None = None,
    *,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    callbacks: Sequence[Callback] = (),
    **values: Any,
) -> TrainResult:
    """Train and return where the adapter is and how the losses went; the same call goes on where it stopped.

    config: YAML file, mapping of its sections, or checked config. values: sections or keys that go on top, e.g.
    model="...", train={"updates": 100}.
    allow_change: settings such as "optimizer.lr", or "data" or "base", in which a resumed run may differ.
    """
    from shared.jobs.train import train as run

    return run(load_config(config, **values), resume=resume, callbacks=callbacks, allow_change=allow_change)


def sweep(
    config: Config | None,
    grid: str | Path | Mapping[str, Sequence[Any]],
    *,
    overrides: Sequence[str] = (),
    watch: Callable[[], Sequence[Callback]] = tuple,
    note: Callable[[str], None] = lambda text: None,
    **values: Any,
) -> SweepResult:
    """Train every combination of a grid's values, {"optimizer.lr": [1e-4, 1e-3]}; the same call goes on.

    Each has a folder of its own in the output. values, overrides: as `load_config` takes them. watch: makes the
    callbacks of a run.
    """
    from shared.jobs.sweep import read_grid
    from shared.jobs.sweep import sweep as run

    def make(more: Sequence[str], output: str | None) -> RunConfig:
        given = values if output is None else {**values, "output": output}
        return load_config(config, overrides=[*overrides, *more], **given)

    if isinstance(grid, Mapping):
        return run(make, grid, watch=watch, note=note)
    return run(make, read_grid(Path(grid)), watch=watch, note=note, place=Path(grid).name)


def estimate(
    config: Config | None = None,
    *,
    memory: str | None = None,
    tflops: float | None = None,
    **values: Any,
) -> Report:
    """Return bytes by part, time per update and the largest settings that fit; loads no weights.

    memory: one size, e.g. "16GB" or "here", instead of the usual ones. tflops: the matmul rate to predict times from.
    """
    from shared.estimate.report import make_report

    return make_report(load_config(config, **values), memory=memory, tflops=tflops)


def preview(config: Config | None = None, *, rows: int = 5, **values: Any) -> Preview:
    """Return what a run would learn from its rows, token by token for the first `rows`; loads no model."""
    from shared.jobs.preview import preview as run

    return run(load_config(config, **values), rows=rows)


def evaluate(
    model: str, data: str, *, adapter: Adapters = None, backend: str = "auto", generate: int = 0, **options: Any
) -> Evaluation:
    """Return loss (nats per supervised token), perplexity and token counts of a model on rows.

    generate: answer so many prompts, too; `scores` of the result then has exact_match, token_f1 and rouge_l.
    options: split, columns, max_length, max_tokens (of an answer), train_on, dtype, quantization, device.
    """
    from dataclasses import replace

    from shared.evaluating.exams import mean_scores
    from shared.sessions import answer_rows, evaluate_rows, find_rows, open_session

    rows, _ = find_rows(str(data), split=options.pop("split", None), columns=options.pop("columns", None))
    opened = {key: options.pop(key) for key in ("dtype", "quantization", "device") if key in options}
    session = open_session(str(model), adapter=adapter, backend=backend, **opened)
    most = options.pop("max_tokens", None)
    found = evaluate_rows(session, rows, **options)
    if not generate:
        return found
    return replace(found, scores=mean_scores(answer_rows(session, rows, number=generate, max_tokens=most)))


def generate(
    model: str, prompt: str | Sequence[str], *, adapter: Adapters = None, backend: str = "auto",
    chat: bool | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Return the text that follows a prompt; of several prompts, computed together, a list of texts.

    options: max_tokens (128), temperature (0: greedy), top_k, top_p, min_p, repetition_penalty, stop, seed, batch_size;
    dtype, quantization, device. chat: wrap prompts in the chat template; None: if the adapter learned from messages.
    """
    from shared import sessions

    prompts = _texts(prompt)
    session, settings = _open(model, adapter=adapter, backend=backend, options=options)
    ids = [sessions.prompt_ids(session, text, chat=chat) for text in prompts]
    sampling = sessions.sampling_for(session, **settings)
    sessions.check_room(session, ids, sampling)
    texts = [found.text for found in sessions.complete_all(session, ids, sampling)]
    return texts[0] if isinstance(prompt, str) else texts


def stream(
    model: str,
    prompt: str,
    *,
    adapter: Adapters = None,
    backend: str = "auto",
    chat: bool | None = None,
    **options: Any,
) -> Iterator[str]:
    """Yield the text that follows a prompt, piece by piece; options as `generate` has them."""
    from shared import sessions

    (prompt,) = _texts([prompt])
    session, settings = _open(model, adapter=adapter, backend=backend, options=options)
    ids = sessions.prompt_ids(session, prompt, chat=chat)
    sampling = sessions.sampling_for(session, **settings)
    sessions.check_room(session, [ids], sampling)
    for piece, _ in sessions.stream(session, ids, sampling):
        yield piece


def chat(
    model: str, *, system: str | None = None, adapter: Adapters = None, backend: str = "auto", **options: Any
) -> Chat:
    """Return a conversation: `.say(text)` gives the next answer, `.stream(text)` its pieces, `.messages` the history.

    options: as `generate` has them; max_tokens 1024, temperature 0.7 and top_p 0.95 by default.
    """
    from shared.generation.config import chat_settings
    from shared.jobs.chat import Chat
    from shared.sessions import sampling_for

    session, settings = _open(model, adapter=adapter, backend=backend, options=options)
    return Chat(session, sampling_for(session, **chat_settings(settings)), system)


def _texts(prompt: Any) -> list[str]:
    """Return prompts as a list of texts; raises ConfigError."""
    from shared.errors import ConfigError

    found = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Iterable) else None
    if found is None or not all(isinstance(text, str) for text in found):
        raise ConfigError(f"the prompt is {prompt!r}", expected="a text, or a list of texts")
    return found


def _open(model: str, *, adapter: Adapters, backend: str, options: dict[str, Any]) -> tuple[Session, dict[str, Any]]:
    """Return a session, and the options that are settings of generation, checked before anything is loaded."""
    from shared.generation.config import read_settings
    from shared.sessions import open_session

    opened = {key: options[key] for key in ("dtype", "quantization", "device") if key in options}
    settings = {key: value for key, value in options.items() if key not in opened}
    read_settings(settings)
    return open_session(str(model), adapter=adapter, backend=backend, **opened), settings


def convert(
    source: str | Path, *, to: str, output: str | Path, base: str | Path | None = None, force: bool = False,
    **options: Any,
) -> Converted | ModelResult:  # fmt: skip
    """Write an adapter or a whole model in the files of another program; which one it is the folder tells.

    Adapters go to "peft", "mlx" (mlx-lm; converted back it has its first bytes again) and "gguf" (llama.cpp). Models go
    to "hf", "mlx", "gguf" and "ollama"; options: weights (of GGUF's matrices), dtype (of hf and mlx).
    """
    from shared.convert.adapters import convert_adapter
    from shared.convert.models import convert_model, export_adapter, is_adapter

    folder = Path(source).expanduser()
    if not is_adapter(folder, to=to, options=options, base=text(base)):
        return convert_model(str(source), to=to, output=str(output), force=force, **options)
    if to == "gguf":
        return export_adapter(folder, output=str(output), base=text(base), force=force)
    return convert_adapter(folder, Path(output).expanduser(), to=to, base=text(base), force=force)


def fuse(model: str | Path, *, adapter: str | Path, output: str | Path, **options: Any) -> FuseResult:
    """Write base and adapter as one model folder, and return how much of the adapter is in it.

    options: scheme ("none" for full precision, "same" for the base's own grid, or a format to quantize to), dtype,
    accept_loss, force, data, backend.
    """
    from shared.jobs.fuse import fuse as run

    return run(str(model), adapter=str(adapter), output=str(output), sample=DEMO / "task", **options)


def quantize(model: str | Path, *, scheme: str, output: str | Path | None, **options: Any) -> QuantizeResult:
    """Write a float model in fewer bits to a new folder, or with output None only measure what it would cost.

    options: overrides (`PATTERN=SCHEME`), keep (patterns of modules that stay floats), force, base3.
    """
    from shared.convert.quantize import quantize as run

    return run(str(model), scheme=scheme, output=None if output is None else Path(output).expanduser(), **options)


def merge(
    adapters: Sequence[str | Path], *, output: str | Path, method: str = "concat", rank: int | None = None,
    density: float | None = None, base: str | Path | None = None, force: bool = False,
) -> Merged:  # fmt: skip
    """Write several adapters (folders, or "folder=weight") as one.

    method: "concat" the exact sum, "svd" of a `rank`, "linear" and "ties" (with a `density`) as PEFT has them.
    """
    from shared.convert.merge import merge_adapters

    options = {"method": method, "rank": rank, "density": density, "base": text(base), "force": force}
    return merge_adapters([str(one) for one in adapters], Path(output).expanduser(), **options)


def parity(
    config: Config, *, updates: int | None = None, note: Callable[[str], None] = lambda text: None
) -> ParityResult:
    """Return the gaps between MLX and PyTorch on the same batches; `.ok` says whether all are within bounds."""
    from shared.jobs.parity import parity as run

    return run(load_config(config), updates=updates, note=note)


def doctor() -> list[Check]:
    """Return the lines of a report on this machine, with a real training step on every backend."""
    from shared.jobs.doctor import examine

    return examine(DEMO)


def quickstart(output: str | Path = "runs/quickstart", *, backend: str = "auto", **options: Any) -> QuickstartResult:
    """Fine-tune the embedded demo base and return exact match before and after, on both backends where installed."""
    from shared.jobs.quickstart import quickstart as run

    return run(DEMO, Path(output), backend=backend, **options)


def bench(
    *, size: str = "auto", backend: str = "auto", dtype: str = "auto", output: str | Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> BenchResult:  # fmt: skip
    """Return how fast this machine fine-tunes, against its own ceilings.

    `.table` of the result is Markdown; its rows are appended to `output`. size: auto, tiny, small, medium, large, huge.
    """
    from shared.measuring.bench import bench as run

    file = None if output is None else Path(output).expanduser()
    return run(size=size, backend=backend, dtype=dtype, output=file, note=note)


def runs(folder: str | Path = "runs") -> list[RunFacts]:
    """Return the runs in a folder, the newest last."""
    from shared.jobs.runs import list_runs

    return list_runs(Path(folder).expanduser())


def compare(a: str | Path, b: str | Path, *, data: str | None = None, **options: Any) -> Comparison:
    """Return what two run folders have different; with `data` a paired bootstrap of their losses on its rows.

    options: html (a page to write), and with data: backend, note.
    """
    from shared.jobs.runs import compare as run

    return run(Path(a).expanduser(), Path(b).expanduser(), data=data, **options)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a config file."""
    from shared.config import schema as build

    return build()


def text(path: str | Path | None) -> str | None:
    """Return a path as text, None as None."""
    return None if path is None else str(path)
