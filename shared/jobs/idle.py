"""Settings that were given and do nothing in this run: each is told once, by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shared.adapters.own import is_own
from shared.adapters.spec import ends_of
from shared.config import RunConfig
from shared.data.stream import Stream
from shared.jobs.prepare import Prepared
from shared.optimizers import method_of, rule_name
from shared.running.run import Run
from shared.schedules import count_steps
from shared.sections import Section

OFF = (False, None, "auto", {}, [])  # False is 0, too
MANY_PASSES = 100  # over the rows, from which a run is told how many it does
OF_ADAPTERS = "adapter.rank alpha dropout targets layers rank_pattern alpha_pattern modules_to_save ensure_weight_tying"
OF_EVALUATIONS = "evaluation.batches sets generate max_tokens patience metric mode min_delta restore_best"


@dataclass(frozen=True)
class Facts:
    """What decides whether a setting can have an effect."""

    run: Run
    prepared: Prepared

    @property
    def config(self) -> RunConfig:
        """Return the run's config."""
        return self.run.config

    @property
    def has_adamw(self) -> bool:
        """Return whether AdamW steps some tensor: Muon leaves it what is no matrix of a layer."""
        method = method_of(self.config)
        return any(rule_name(method, name, t.shape) == "adamw" for name, t in self.run.model.tensors("adapter"))

    @property
    def all_text(self) -> bool:
        """Return whether every token behind the first carries loss, as of rows of text."""
        rows = self.prepared.train
        if self.prepared.kind != "text" or isinstance(rows, Stream):
            return False
        return all(row.supervised[1:].all() for row in rows)

    def optimizer(self, *names: str) -> bool:
        """Return whether the optimizer is one of these."""
        return self.config.optimizer.name in names

    def schedule(self, name: str) -> bool:
        """Return whether the schedule is this one."""
        return self.config.schedule.name == name


@dataclass(frozen=True)
class Idle:
    """Settings of one section, when they do nothing, and why, in which {} are settings of the config."""

    keys: str
    why: str
    when: Callable[[Facts], bool]


TABLE = (
    Idle(OF_ADAPTERS, "adapter.type is none: every parameter is trained", lambda f: f.config.adapter.type == "none"),
    Idle(
        "adapter.ensure_weight_tying", "neither embedding nor head is adapted or trained whole",
        lambda f: not ends_of([*f.run.spec.modules, *f.run.spec.saved]),
    ),
    Idle("adapter.ensure_weight_tying", "the head is a tensor of its own", lambda f: not f.run.model.info.is_tied),
    Idle("optimizer.betas", "{optimizer.name} has none", lambda f: f.optimizer("sgd", "adafactor")),
    Idle("optimizer.eps", "{optimizer.name} has none", lambda f: f.optimizer("sgd", "adafactor", "lion")),
    Idle(
        "optimizer.betas eps", "muon has none, and every trained tensor is a matrix of a layer",
        lambda f: f.optimizer("muon") and not f.has_adamw,
    ),
    Idle(
        "optimizer.momentum nesterov", "{optimizer.name} has none",
        lambda f: f.optimizer("adamw", "adam", "lion", "adafactor", "adadelta"),
    ),
    Idle(
        "optimizer.nesterov state", "sgd without momentum keeps nothing",
        lambda f: f.optimizer("sgd") and f.config.optimizer.momentum == 0,
    ),
    Idle(
        "optimizer.lora_plus_ratio", "adapter.type is none: there is no B of LoRA",
        lambda f: f.config.adapter.type == "none",
    ),
    Idle("schedule.final", "the rate is constant", lambda f: f.schedule("constant")),
    Idle("schedule.cycles", "schedule.name is {schedule.name}", lambda f: not f.schedule("cosine_with_restarts")),
    Idle("schedule.power", "schedule.name is {schedule.name}", lambda f: not f.schedule("polynomial")),
    Idle("schedule.decay", "schedule.name is {schedule.name}", lambda f: not f.schedule("warmup_stable_decay")),
    Idle(OF_EVALUATIONS, "evaluation.every is null: nothing is evaluated", lambda f: f.config.evaluation.every is None),
    Idle(
        "data.valid_split", "evaluation.every is null: the rows that it keeps from training are not evaluated",
        lambda f: f.config.evaluation.every is None,
    ),
    Idle(
        "evaluation.batches generate max_tokens min_delta mode", "there are no rows to evaluate on",
        lambda f: not f.run.valid and not f.run.sets,
    ),
    Idle("evaluation.max_tokens", "evaluation.generate is null", lambda f: f.config.evaluation.generate is None),
    Idle("evaluation.min_delta", "evaluation.patience is null", lambda f: f.config.evaluation.patience is None),
    Idle(
        "evaluation.metric mode", "neither evaluation.patience nor restore_best asks for the best",
        lambda f: f.config.evaluation.patience is None and not f.config.evaluation.keeps_best,
    ),
    Idle(
        "evaluation.every", "the run has {updates}, so only its start and its end are evaluated",
        lambda f: (f.config.evaluation.every or 0) > f.run.updates,
    ),
    Idle(
        "checkpoint.every", "the run has {updates}, so only its end is saved",
        lambda f: (f.config.checkpoint.every or 0) > f.run.updates,
    ),
    Idle("log.every", "the run has {updates}, so only its end is logged",
         lambda f: f.config.log.every > f.run.updates),
    Idle("log.profile", "it begins with update 3, and the run has {updates}", lambda f: f.run.updates < 3),
    Idle("data.train_on", "the rows are texts, of which everything counts", lambda f: f.all_text),
    Idle(
        "data.padding_side", "rows are packed end to end, and data.packing none pads them",
        lambda f: f.run.layout.packed and not f.run.layout.shapes,
    ),
    Idle("data.packing", "train.compile pads to its shapes", lambda f: f.config.train.compile is True),
)  # fmt: skip


def idle_settings(run: Run, prepared: Prepared) -> Iterator[str]:
    """Yield a line for the settings that were given and do nothing in this run, those of one reason together."""
    facts, told = Facts(run, prepared), set[str]()
    for row in TABLE:
        name, _, keys = row.keys.partition(".")
        section = getattr(run.config, name)
        given = [f"{name}.{key}" for key in keys.split() if is_given(section, key)]
        if (left := [key for key in given if key not in told]) and row.when(facts):
            told.update(left)
            why = row.why.format(**dict(run.config), updates=f"{run.updates:,} update{'s' if run.updates > 1 else ''}")
            yield f"{', '.join(left)} {'does' if len(left) == 1 else 'do'} nothing in this run: {why}"


def is_given(section: Section, key: str) -> bool:
    """Return whether a key was set to more than off; in a section with every key, as a run folder has it, to another
    value than its default.
    """
    value, fields = getattr(section, key), type(section).model_fields
    whole = section.model_fields_set == set(fields)
    return value != fields[key].default or (key in section.model_fields_set and not whole and value not in OFF)


def odd_sizes(run: Run) -> Iterator[str]:
    """Yield what is larger than what it is for: a batch, a run, a warm-up, the rank of an adapter."""
    plan, config = run.plan, run.config
    if config.train.batch_size > plan.num_rows:
        yield f"train.batch_size is {config.train.batch_size}: every update takes all {plan.num_rows} rows of an epoch"
    if (passes := run.updates / plan.updates_per_epoch) > MANY_PASSES:
        yield f"{run.updates:,} updates are {passes:,.0f} passes over the {plan.num_rows:,} rows"
    if count_steps(config.schedule.warmup, updates=run.updates) >= run.updates:
        what = f"schedule.warmup is {config.schedule.warmup:g}, the run has {run.updates} updates"
        yield f"{what}: the learning rate rises to its end"
    sides = {name: min(run.model.info.adaptable[name][-2:]) for name in run.spec.modules}
    large = [name for name, side in sides.items() if run.spec.rank_of(name) > side and not is_own(run.spec.kind)]
    if large:
        worst = min(large, key=sides.__getitem__)
        yield (
            f"adapter.rank {run.spec.rank_of(worst)} is more than {len(large)} of {len(sides)} matrices can use "
            f"({worst}: {sides[worst]}): it costs memory and adds nothing"
        )
