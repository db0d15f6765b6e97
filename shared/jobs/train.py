"""`train`: from a config to a run folder with an adapter in it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import faults
from shared.adapters.bases import architecture_of, check_base, other_weights
from shared.adapters.folder import read_adapter
from shared.adapters.hashes import noted
from shared.adapters.spec import resolve
from shared.adapters.start import start_values
from shared.adapters.writing import write_adapter
from shared.callbacks import Callback, tell
from shared.config import RunConfig
from shared.convergence import convergence_checks
from shared.data.layout import training_layout
from shared.data.rows import other_valid
from shared.data.stream import Stream, sample_of, told_first
from shared.durable import put_in_place, sync
from shared.errors import MlxloraError, ModelError, OutOfMemory, StorageError
from shared.estimate.plan import with_settings
from shared.estimate.report import decide_run, what_fits
from shared.export import write_model
from shared.folder import open_folder
from shared.jobs.idle import idle_settings, odd_sizes
from shared.jobs.prepare import Prepared, prepare
from shared.loop import fit
from shared.optimizers import method_of
from shared.profiling import tracing
from shared.protocols import Backend, Model
from shared.registry import check_installed, find_backend
from shared.running.card import write_card
from shared.running.checkpoint import Checkpoint, step_dirs
from shared.running.evaluations import evaluation_warnings
from shared.running.lock import locked
from shared.running.recovery import LateOutOfMemory
from shared.running.result import add_result, has_ended, has_result, read_result, restore_best
from shared.running.run import LoopState, Run
from shared.running.run_folder import (
    Identity,
    as_made,
    begin,
    changed_maker,
    changed_rows,
    check_allowed,
    check_output,
    command_line,
    find_checkpoint,
    flat_settings,
    hash_files,
    joint_hash,
    maker_of,
    manifest_of,
    open_run,
    with_whole_paths,
    write_manifest,
)
from shared.running.samples import take_samples
from shared.schemes import parse_scheme
from shared.strict import beyond_positions, check_length
from shared.types import AdapterSpec, Capability, Recompute
from shared.watching.gradients import gradient_checks
from shared.watching.report import write_report
from shared.watching.sinks import check_sinks, sinks


@dataclass(frozen=True)
class TrainResult:
    """What a finished run gives: the folder, the last losses, and how many updates there are."""

    output: Path
    adapter: Path
    updates: int
    loss: float | None
    eval_loss: float | None  # of the result
    time_s: float
    skipped_updates: int
    already_complete: bool
    result_update: int  # whose weights these are: of the last update, or of the best evaluation
    stopped_early: bool
    diverged: str  # in words, where the loss ended far above where it began; else empty
    evaluation: dict[str, float]  # every metric of the evaluation after that update


def train(
    config: RunConfig, *, resume: str = "auto", callbacks: Sequence[Callback] = (), command: Sequence[str] = (),
    allow_change: Collection[str] = (),
) -> TrainResult:  # fmt: skip
    """Train as the config says, or go on where the run folder stands; raises MlxloraError subclasses.

    allow_change: settings, "data" or "base", which may differ from what the run was started with.
    """
    check_allowed(allow_change, config)
    check_output(config, resume)
    check_installed(config.backend)
    check_sinks(config.log.to)
    if size := told_first(config):  # behind the checks: rows of the hub are downloaded for it
        tell(callbacks, "on_note", size)
    while True:
        try:
            return train_once(config, resume=resume, callbacks=callbacks, command=command, allow_change=allow_change)
        except LateOutOfMemory as error:
            micro = error.micro_tokens
        tell(
            callbacks, "on_note", f"out of memory: from the last checkpoint on micro-batches of at most {micro} tokens"
        )
        config = with_settings(config, {"train.micro_tokens": micro})
        if step_dirs(config.output_dir / "checkpoints"):
            resume = "auto"


def train_once(
    config: RunConfig, *, resume: str, callbacks: Sequence[Callback], command: Sequence[str],
    allow_change: Collection[str],
) -> TrainResult:  # fmt: skip
    """Do as `train`, but raise LateOutOfMemory where the model must be loaded again to go on."""
    folder = config.output_dir
    prepared = prepare(config)
    backend = find_backend(config.backend)
    made = open_run(folder)

    def note(text: str) -> None:
        tell(callbacks, "on_note", text)

    with locked(folder, note, made=made), tracing(backend, folder, config.log.profile) as tracers:
        hashes = hash_files([*prepared.base.files, prepared.base.path / "config.json"])

        def identity() -> Identity:
            return make_identity(prepared, hashes)

        found = find_checkpoint(folder, resume, identity, note, allowed=allow_change)
        run = build_run(prepared, backend, found, folder=folder, callbacks=callbacks, identity=identity)
        changed = changed_rows(folder, prepared.data_files, sets=prepared.sets)
        if found is not None and has_ended(run):
            run.maker = found.state["maker"]
        for text in (*changed_maker(found, run.maker), *changed):
            note(text)
        begin(folder, found, resume=resume)
        given = command or command_line()
        with sinks(folder, config.log.to, note) as trackers:
            checks = [*convergence_checks(config, note), *gradient_checks(config, folder, note)]
            run.callbacks = [trackers, *tracers, *checks, *callbacks]
            try:
                return finish_run(run, prepared, backend.probe(), base=hashes.result(), command=given)
            except LateOutOfMemory:
                raise
            except OutOfMemory as error:
                fix = what_fits(config, prepared.base, sample_of(prepared.train), backend=backend)
                raise OutOfMemory(error.what, fix=fix or error.fix) from None


def finish_run(
    run: Run, prepared: Prepared, capability: Capability, *, base: Mapping[str, str], command: Sequence[str]
) -> TrainResult:
    """Train what is left of a run, write its results, and return them."""
    facts = describe_run(run, prepared)
    complete = run.state.finished = has_ended(run)
    lost = complete and not isinstance(manifest_of(run.folder).get("updates"), int)
    if lost:
        tell(run.callbacks, "on_note", "manifest.json was missing or damaged: it is written anew")
    if lost or not complete:
        resolved = with_whole_paths(run.config, run.folder)
        data = prepared.data_files
        maker = as_made(capability, run.maker)
        write_manifest(run.folder, resolved, maker, base=base, data=data, facts=facts, command=command)
    for text in warnings(run, prepared, capability):
        tell(run.callbacks, "on_note", text)
    place = {"backend": capability.name, "device": capability.reason, "from": run.state.step}
    tell(run.callbacks, "on_start", {**facts, **place})
    if not complete:
        fit(run)
    target = run.folder / result_name(run.spec)
    whole = is_whole(target)
    if complete and not whole:
        tell(run.callbacks, "on_note", f"{target} was missing or damaged: it is written anew from the checkpoint")
    if not (complete and has_result(run) and whole and (run.folder / "report.html").is_file()):
        result = restore_best(run)
        write_result(run, prepared, result)
        add_result(run, result)
        write_report(run.folder, samples=take_samples(run, prepared.tokenizer))
    result = summarize(run, target, complete=complete)
    losses = {"loss": result.loss, "eval_loss": result.eval_loss}
    tell(run.callbacks, "on_end", {"output": str(run.folder), "adapter": str(target), **losses})
    return result


def warnings(run: Run, prepared: Prepared, capability: Capability) -> Iterator[str]:
    """Yield what a user would want to know before the run: leaks, lengths, settings in vain, a dtype that is slow."""
    if any(prepared.dropped.values()):
        counts = ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in prepared.dropped.items())
        yield f"rows that data.drop leaves out: {counts}"
    yield from (notice.text for notice in prepared.notices)
    for name, count in prepared.leaks.items():
        rows = prepared.sets.get(name, prepared.valid)
        what = f"rows of {name}" if name in prepared.sets else "validation rows"
        yield f"{count} of {len(rows)} {what} also stand in the training rows"
    yield from evaluation_warnings(run)
    yield from other_names(run, prepared)
    longest = max(len(example.tokens) for example in sample_of(prepared.train))
    if text := beyond_positions(longest, run.model.info.max_positions):
        yield text
    if run.config.adapter.start is not None and run.state.step == 0:
        yield from other_weights(read_adapter(Path(run.config.adapter.start).expanduser()), run.identity["base"])
    yield from odd_sizes(run)
    yield from idle_settings(run, prepared)
    if capability.device == "cpu" and run.config.train.dtype != "float32":
        yield f"{run.config.train.dtype} is slow on a CPU; --set train.dtype=float32 is faster"


def other_names(run: Run, prepared: Prepared) -> Iterator[str]:
    """Yield which file may hold rows to evaluate on, where no valid.jsonl does."""
    roots = [Path(source.path).expanduser() for source in prepared.config.data.sources]
    if prepared.valid or run.config.evaluation.every is None or "valid" in run.config.data.splits:
        return
    for root in filter(Path.is_dir, roots):
        if name := other_valid(root):
            yield f"{root} holds {name}, perhaps rows to evaluate on: --set 'data.splits={{valid: {name}}}' takes them"


def make_identity(prepared: Prepared, hashes: Future[dict[str, str]]) -> Identity:
    """Return what a resume compares; waits for the base's hashes."""
    return Identity(
        settings=flat_settings(prepared.config),
        data=prepared.data_hash,
        base=joint_hash(hashes.result()),
        streamed=isinstance(prepared.train, Stream),
        other_data=prepared.other_hash,
    )


def build_run(
    prepared: Prepared, backend: Backend, found: Checkpoint | None, *, folder: Path, callbacks: Sequence[Callback],
    identity: Callable[[], Identity],
) -> Run:  # fmt: skip
    """Load the model, attach the adapter, and put both where the checkpoint says."""
    config = prepared.config
    if found is None and config.adapter.start is not None:
        check_base(read_adapter(Path(config.adapter.start).expanduser()), prepared.base)  # before the model is loaded
    chosen = decide_run(config, prepared.base, sample_of(prepared.train), backend=backend)
    model, spec = load_trainable(prepared, backend, recompute=chosen.recompute)
    free = "auto" in (config.train.micro_tokens, config.train.recompute)
    for text in (*model.info.notes, *([chosen.note] if free else [])):
        tell(callbacks, "on_note", text)
    if found is not None:
        model.load_tensors("adapter", found.adapter)
    elif spec.kind != "none":
        model.load_tensors("adapter", start_values(config, spec, model, prepared.base))
    layout = training_layout(config, model.info, prepared.train, micro_tokens=chosen.micro_tokens)
    trainer = backend.trainer(model, objective="sft", optimizer=method_of(config), shapes=layout.shapes)
    if found is not None:
        trainer.load_state(found.optimizer)
    state = LoopState(**found.state["loop"]) if found else LoopState()
    plan = prepared.plan
    updates = config.train.updates or plan.updates_per_epoch * (config.train.epochs or 1)
    return Run(
        config=config, folder=folder, model=model, trainer=trainer, train=prepared.train, valid=prepared.valid,
        sets=prepared.sets, exam=prepared.exam, plan=plan, updates=updates, layout=layout,
        identity=identity().as_dict(), maker=maker_of(backend), callbacks=callbacks, state=state, spec=spec,
    )  # fmt: skip


def load_trainable(
    prepared: Prepared, backend: Backend, *, dtype: str | None = None, recompute: Recompute | None = None
) -> tuple[Model, AdapterSpec]:
    """Return the base with what the config makes trainable; recompute None: as the config says, "auto" is off."""
    config = prepared.config
    check_trainable(prepared)
    model = backend.load_model(
        prepared.base.path,
        dtype=dtype or config.train.dtype,
        quantization=parse_scheme(config.quantization),
        recompute=config.train.recompute is True if recompute is None else recompute,
        device=None if config.device == "auto" else config.device,
    )
    examples = (sample_of(prepared.train), prepared.valid, *prepared.sets.values())
    longest = max((example for some in examples for example in some), key=lambda example: len(example.tokens))
    check_length(model.info, len(longest.tokens), what=longest.source)
    if isinstance(prepared.train, Stream):  # nobody knows its longest row
        check_length(model.info, config.data.max_length, what="rows of data.max_length")
    spec = resolve(config.adapter, model.info)
    model.attach(spec)
    return model, spec


def check_trainable(prepared: Prepared) -> None:
    """Raise ModelError for full fine-tuning of a folder that is stored quantized."""
    if prepared.config.adapter.type == "none" and prepared.base.schemes:
        raise ModelError(
            f"{prepared.base.path} is quantized, so its weights cannot be trained (adapter.type: none)",
            code="E309",
            fix="set adapter.type: lora, or use the unquantized model",
        )


def describe_run(run: Run, prepared: Prepared) -> dict[str, Any]:
    """Return facts for the manifest and the display."""
    info, spec = run.model.info, run.spec
    sets = {"sets": {name: len(rows) for name, rows in prepared.sets.items()}} if prepared.sets else {}
    trained = sum(math.prod(tensor.shape) for _, tensor in run.model.tensors("adapter"))
    return {
        "model": run.config.model,
        "family": info.family,
        "quantization": sorted(set(info.quantized.values())) or ["none"],
        "adapter": spec.kind,
        "modules": len(spec.modules),
        "trained_parameters": trained,
        "rows": {"train": len(prepared.train), "valid": len(prepared.valid), "kind": prepared.kind, **sets},
        **({"dropped": prepared.dropped} if prepared.dropped else {}),
        **({"notices": {notice.what: notice.count for notice in prepared.notices}} if prepared.notices else {}),
        **count_tokens(prepared),
        "updates": run.updates,
        "updates_per_epoch": run.plan.updates_per_epoch,
        "micro_tokens": run.layout.micro_tokens,
    }


def count_tokens(prepared: Prepared) -> dict[str, Any]:
    """Return how many tokens the training rows have; of streamed ones nobody knows before they are read."""
    if isinstance(prepared.train, Stream):
        return {"streamed": True}
    most = prepared.config.data.max_length
    return {
        "tokens": {
            "train": int(sum(len(example.tokens) for example in prepared.train)),
            "supervised": int(sum(example.supervised.sum() for example in prepared.train)),
            "cut_at_max_length": sum(len(example.tokens) >= most for example in prepared.train),
        }
    }


def result_name(spec: AdapterSpec) -> str:
    """Return the name of the result's folder: adapter, or model after full fine-tuning."""
    return "model" if spec.kind == "none" else "adapter"


def is_whole(target: Path) -> bool:
    """Return whether a result is there and reads: an adapter with every file noted of it, a model by its headers."""
    try:
        if target.name == "model":
            return bool(open_folder(target).files)
        return all((target / name).is_file() for name in noted(read_adapter(target).notes))
    except MlxloraError:
        return False


def write_result(run: Run, prepared: Prepared, result: Mapping[str, Any]) -> None:
    """Write the adapter folder (or the whole model after full fine-tuning), whole or not at all."""
    kind = result_name(run.spec)
    final, staged = run.folder / kind, run.folder / f".{kind}.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    notes = {
        "quantization": run.config.quantization,
        "dtype": run.config.train.dtype,
        "rows": prepared.kind,
        "seed": run.config.train.seed,
        "base": run.identity["base"],
        "architecture": architecture_of(prepared.base),
    }
    try:
        staged.mkdir()
        tensors = dict(run.model.tensors("adapter"))
        if kind == "adapter":
            write_adapter(staged, run.spec, tensors, run.model.info, base=run.config.model, notes=notes)
        else:
            write_model(staged, tensors, source=prepared.base, dtype=run.config.train.dtype)
        write_card(staged, run, kind=kind, train_rows=len(prepared.train), result=result)
        for file in staged.iterdir():
            sync(file)
        faults.hit("result.before_rename")
        put_in_place(staged, final)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise StorageError(
            f"cannot write {final}: {error.strerror}", fix="free some space and run the command again"
        ) from None


def summarize(run: Run, target: Path, *, complete: bool) -> TrainResult:
    """Return the result of a run from its metrics and manifest."""
    rows, result = run.metrics.read(), read_result(run.folder)
    update = result.get("update", run.state.step)
    losses = [row["loss"] for row in rows if "loss" in row]
    evaluations = [row for row in rows if any(key.startswith("eval_") for key in row) and row["step"] <= update]
    evaluated = evaluations[-1] if evaluations else {}
    return TrainResult(
        output=run.folder,
        adapter=target,
        updates=run.state.step,
        loss=losses[-1] if losses else None,
        eval_loss=evaluated.get("eval_loss"),
        time_s=run.state.time_s,
        skipped_updates=run.state.skipped,
        already_complete=complete,
        result_update=update,
        stopped_early=bool(result.get("stopped_early")),
        diverged=str(result.get("diverged", "")),
        evaluation={key: value for key, value in evaluated.items() if key.startswith("eval_")},
    )
