"""The one schema of a run. Every default of the project lives here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)  # fmt: skip

from shared.errors import ConfigError
from shared.problems import Places, describe, key_advice, keys_of
from shared.schemes import parse_scheme
from shared.sections import (
    Count,
    Name,
    NotNegative,
    Positive,
    Section,
    Share,
    ShareBelowOne,
    is_import_path,
    not_a_switch,
)
from shared.types import MomentFormat, PaddingSide, Spikes


class SourceConfig(Section):
    path: Name
    weight: Annotated[Positive, Field(description="how often one epoch takes each row: 0.5 the half of them")] = 1.0


class DataConfig(Section):
    path: Annotated[
        Name | Annotated[list[SourceConfig], Field(min_length=1)],
        Field(description="folder, org/name, org/name:config, or file (JSON, CSV, Parquet); several: {path, weight}"),
    ]
    columns: Annotated[
        dict[Literal["text", "prompt", "completion", "messages", "tools"], Name],
        Field(description="the file's names of our columns, e.g. {prompt: question, completion: answer}"),
    ] = {}
    splits: Annotated[
        dict[Literal["train", "valid"], Name],
        Field(description="the data set's names of our splits, e.g. {train: train_sft, valid: test_sft}"),
    ] = {}
    max_length: Annotated[int, Field(ge=2, strict=True, description="tokens; longer rows are cut at the end")] = 2048
    train_on: Annotated[
        Literal["completion", "assistant", "all"],
        Field(description="completion and assistant: what the model has to say; all: every token"),
    ] = "completion"
    drop: Annotated[
        list[Literal["empty", "duplicate", "too_long"]],
        Field(description="rows to leave out, counted: nothing to learn, seen before, longer than max_length"),
    ] = []
    valid_split: Annotated[
        Annotated[float, Field(gt=0, lt=1), BeforeValidator(not_a_switch)] | None,
        Field(description="share of the training rows to evaluate on instead; equal rows stay together"),
    ] = None
    packing: Annotated[
        Literal["auto", "packed", "none"],
        Field(description="packed: examples end to end, none: sorted by length and padded; never changes the result"),
    ] = "auto"
    padding_side: Annotated[
        PaddingSide,
        Field(
            description="where rows that are not packed are padded to the longest beside them; never changes results"
        ),
    ] = "right"
    streaming: Annotated[
        Literal["auto"] | bool,
        Field(
            description="read rows when they are due, not all before; auto: a gigabyte of .jsonl or more; same result"
        ),
    ] = "auto"
    cache: Annotated[bool, Field(strict=True, description="keep tokenized rows between runs; never changes them")] = (
        True
    )

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """Return where rows come from: one source, or several."""
        return (SourceConfig(path=self.path),) if isinstance(self.path, str) else tuple(self.path)

    def with_sources(self, sources: Sequence[SourceConfig]) -> DataConfig:
        """Return the section with other sources, one as a path alone."""
        path = sources[0].path if isinstance(self.path, str) else list(sources)
        return self.model_copy(update={"path": path})

    @field_validator("packing", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        return "none" if value is False else value


class AdapterConfig(Section):
    type: Annotated[
        Literal["lora", "rslora", "dora", "none"] | Annotated[str, AfterValidator(is_import_path)],
        Field(
            description="rslora scales by alpha / sqrt(rank), dora learns magnitudes too, none trains every parameter;"
            " or a shared.adapters.own.OwnAdapter of your own, as package.module:NAME"
        ),
    ] = "lora"
    rank: Annotated[int, Field(ge=1, le=65536, strict=True, description="of the product B A")] = 8
    alpha: Annotated[Positive, Field(description="the product is scaled by alpha / rank")] = 16
    dropout: Annotated[ShareBelowOne, Field(description="of what the adapters read, in training")] = 0.0
    targets: Annotated[
        str | list[str],
        Field(description='"all-linear", or names of modules: q_proj, self_attn.q_proj, experts, a full path'),
    ] = "all-linear"
    layers: Annotated[
        Literal["all"] | Count | list[Annotated[int, Field(ge=0, strict=True)]],
        Field(description="all, the last N layers, or a list of layer numbers from 0"),
    ] = "all"
    rank_pattern: Annotated[
        dict[str, Annotated[int, Field(ge=1, le=65536, strict=True)]],
        Field(description="ranks of some modules, by names as in targets; the first that matches counts"),
    ] = {}
    alpha_pattern: Annotated[dict[str, Positive], Field(description="alphas of some modules, in the same way")] = {}
    modules_to_save: Annotated[
        list[str],
        Field(description="modules trained whole beside the adapter, by names as in targets: embed_tokens, norm"),
    ] = []
    ensure_weight_tying: Annotated[
        bool,
        Field(description="of a base whose head is its embedding: what adapts or trains the one does it to both"),
    ] = True
    start: Annotated[
        Name | None,
        Field(description="folder of an adapter to go on from: ours, PEFT's or mlx-lm's; null: a fresh one"),
    ] = None

    @field_validator("targets", "layers")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == [] or value == "":
            raise ValueError("one entry at least")
        return value


USUAL: dict[str, dict[str, Any]] = {  # defaults of optimizers that have their own
    "lion": {"betas": (0.9, 0.99)},
    "adadelta": {"lr": 1.0, "betas": (0.9, 0.9), "eps": 1e-6},
    "muon": {"momentum": 0.95, "nesterov": True},
}


class OptimizerConfig(Section):
    name: Annotated[
        Literal["adamw", "adam", "sgd", "adafactor", "lion", "adadelta", "muon"]
        | Annotated[str, AfterValidator(is_import_path)],
        Field(description="or a shared.optimizers.Rule of your own, as package.module:NAME"),
    ] = "adamw"
    lr: Annotated[Positive, Field(description="peak learning rate")] = 1e-4
    betas: Annotated[
        tuple[ShareBelowOne, ShareBelowOne], Field(description="lion: 0.9 and 0.99; adadelta's rho is the second, 0.9")
    ] = (0.9, 0.999)
    eps: Annotated[Positive, Field(description="adadelta: 1e-6; adafactor and lion have none")] = 1e-8
    weight_decay: Annotated[
        NotNegative,
        Field(description="on tensors of two or more dimensions; decoupled, for adam, sgd, adadelta in the gradient"),
    ] = 0.0
    momentum: Annotated[ShareBelowOne, Field(description="of sgd, and of muon: 0.95")] = 0.9
    nesterov: Annotated[bool, Field(strict=True, description="of sgd, and of muon: true")] = False
    lora_plus_ratio: Annotated[Positive, Field(description="LoRA+: rate of LoRA's B to that of A")] = 1.0
    max_grad_norm: Annotated[Positive | None, Field(description="of all gradients together; null: no clipping")] = 1.0
    state: Annotated[MomentFormat, Field(description="8bit keeps the moments in a quarter of the memory")] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, values: Any) -> Any:
        """Fill in the defaults of the optimizer that is named."""
        name = values.get("name") if isinstance(values, dict) else None
        return {**USUAL[name], **values} if isinstance(name, str) and name in USUAL else values


class ScheduleConfig(Section):
    name: Literal[
        "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "exponential", "inverse_sqrt",
        "warmup_stable_decay",
    ] = "cosine"  # fmt: skip
    warmup: Annotated[NotNegative, Field(description="below 1 a share of all updates, else a number of them")] = 0.03
    final: Annotated[Share, Field(description="share of the peak at the end; inverse_sqrt: never below it")] = 0.0
    cycles: Annotated[Count, Field(description="cosine_with_restarts: half cosines, one after the other")] = 2
    power: Annotated[Positive, Field(description="polynomial: exponent of what is left of the run")] = 2.0
    decay: Annotated[Positive, Field(description="warmup_stable_decay: length of the fall, counted as warmup")] = 0.1

    @model_validator(mode="after")
    def _reachable(self) -> ScheduleConfig:
        if self.name == "exponential" and self.final == 0:
            raise ValueError("a final above 0, such as 0.01, which an exponential can reach")
        return self


class TrainConfig(Section):
    batch_size: Annotated[Count, Field(description="sequences per update")] = 16
    updates: Annotated[Count | None, Field(description="length; 500 where epochs is null too")] = None
    epochs: Annotated[Count | None, Field(description="length as passes over the rows")] = None
    micro_tokens: Annotated[
        Literal["auto"] | Count,
        Field(description="positions per micro-batch; changes memory and speed, never the result"),
    ] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], Field(description="adapters stay float32; float16 scales the loss")
    ] = "bfloat16"
    recompute: Annotated[
        Literal["auto", "offload"] | bool,
        Field(description="layers keep their input only and run again; offload keeps it in host memory (CUDA only)"),
    ] = "auto"
    compile: Annotated[
        Literal["auto"] | bool,
        Field(description="updates as compiled functions of at most 8 padded shapes; auto: off; never changes results"),
    ] = "auto"
    spikes: Annotated[Spikes, Field(description="updates with a loss far above the last ones")] = "warn"
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True, description="of order, adapter and dropout")] = 0

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, values: Any) -> Any:
        """Fill in 500 updates where neither length is set; refuse both."""
        if not isinstance(values, dict):
            return values
        updates, epochs = values.get("updates"), values.get("epochs")
        if updates is not None and epochs is not None:
            raise ValueError("exactly one of updates and epochs, the other null")
        if updates is None and epochs is None:
            return {**values, "updates": 500}
        return values


METRICS = {"loss": "min", "exact_match": "max", "token_f1": "max", "rouge_l": "max"}  # and which way is better


def metric_keys(sets: Iterable[str], *, scores: bool) -> tuple[str, ...]:
    """Return the keys of metrics.jsonl that evaluations of valid.jsonl and more sets give.

    >>> metric_keys(["sql"], scores=False)
    ('eval_loss', 'eval_sql_loss')
    """
    names = ("", *(f"{name}_" for name in sets))
    return tuple(f"eval_{name}{metric}" for name in names for metric in (METRICS if scores else ("loss",)))


class EvaluationConfig(Section):
    every: Annotated[Count | None, Field(description="updates; null: no evaluation")] = 100
    batches: Annotated[
        Literal["all"] | Count, Field(description="all of valid.jsonl, or its first N x batch_size rows")
    ] = "all"
    sets: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], Name],
        Field(description="more rows to evaluate on, {NAME: file, folder or hub data set}: eval_NAME_loss"),
    ] = {}
    generate: Annotated[
        Literal["all"] | Count | None,
        Field(description="answer the first N prompts of each set, greedily: eval_exact_match, _token_f1, _rouge_l"),
    ] = None
    max_tokens: Annotated[Count, Field(description="of an answer at most")] = 128
    patience: Annotated[Count | None, Field(description="stop after so many evaluations without a better metric")] = (
        None
    )
    metric: Annotated[str, Field(description="what patience and the best checkpoint go by, a key of metrics.jsonl")] = (
        "eval_loss"
    )
    mode: Annotated[
        Literal["auto", "min", "max"], Field(description="whether less or more is better; auto: less of a loss")
    ] = "auto"
    min_delta: Annotated[NotNegative, Field(description="a smaller change for the better does not count")] = 0.0
    restore_best: Annotated[
        Literal["auto"] | bool,
        Field(description="keep the best checkpoint and make it the result; auto: where patience is set"),
    ] = "auto"
    convergence: Annotated[bool, Field(strict=True, description="say whether the training loss still falls")] = False

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the keys that rows of evaluations may have."""
        return metric_keys(self.sets, scores=bool(self.generate))

    @property
    def better(self) -> Literal["min", "max"]:
        """Return which way the metric is better."""
        if self.mode != "auto":
            return self.mode
        return "min" if self.metric.endswith("loss") else "max"

    @property
    def keeps_best(self) -> bool:
        """Return whether the best checkpoint is kept, and is the result."""
        return self.patience is not None if self.restore_best == "auto" else self.restore_best

    @field_validator("metric")
    @classmethod
    def _measured(cls, value: str, info: ValidationInfo) -> str:
        sets, generate = info.data.get("sets", {}), info.data.get("generate")
        measured, possible = (metric_keys(sets, scores=scores) for scores in (bool(generate), True))
        if value not in measured:
            first = "evaluation.generate for that one, or " if value in possible and not generate else ""
            raise ValueError(f"{first}a metric that is measured: {', '.join(measured)}")
        return value


class CheckpointConfig(Section):
    every: Annotated[Count | None, Field(description="updates; null: at the end only")] = 100
    keep: Annotated[Count, Field(description="so many, the newest")] = 2


class LogConfig(Section):
    every: Annotated[Count, Field(description="updates")] = 10
    to: list[Literal["jsonl", "tensorboard", "trackio", "wandb", "mlflow"]] = ["jsonl"]  # docs/trackers.md
    gradients: Annotated[
        Count | bool, Field(description="gradient norms by module: in every row of metrics, or every so many updates")
    ] = False
    profile: Annotated[
        Count | None, Field(description="trace so many updates, from the third on, into profile/ of the run folder")
    ] = None


class RunConfig(Section):
    model: Annotated[Name, Field(description="folder or hub id, Hugging Face or MLX-quantized")]
    quantization: Annotated[str, Field(description="none, or affine-4bit-g64 and the like: quantizes at load")] = "none"
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig(updates=500)
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    backend: Annotated[
        Literal["auto", "mlx", "torch"], Field(description="auto: MLX on a Mac, else torch where it is")
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "gpu"], Field(description="gpu: Metal or CUDA")] = "auto"
    output: Annotated[Name | None, Field(description="run folder; null: runs/NAME after the model and the data")] = None

    @field_validator("quantization", mode="before")
    @classmethod
    def _none_word(cls, value: Any) -> Any:
        return "none" if value is None else value

    @property
    def output_dir(self) -> Path:
        """Return the run folder: `output`, or runs/MODEL-DATA."""
        if self.output:
            return Path(self.output).expanduser()
        data = "-".join(Path(source.path).stem for source in self.data.sources)
        return Path("runs") / f"{Path(self.model).name}-{data}"


def validate(values: Any, *, place: str = "config", places: Places | None = None) -> RunConfig:
    """Return the config of a nested dict; raises ConfigError with the place of the first problem."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise describe(RunConfig, error, place=place, places=places or {}) from None
    parse_scheme(config.quantization)
    if config.train.compile is True and config.data.packing == "packed":
        raise ConfigError(
            f"{place}: train.compile true with data.packing packed: packed rows have a new shape in every update",
            fix="set data.packing: auto",
            code="E204",
        )
    if config.adapter.type == "none" and config.adapter.start is not None:
        raise ConfigError(
            f"{place}: adapter.start with adapter.type none", code="E204", fix="mlxlora fuse, and train its result"
        )
    if config.adapter.type == "none" and config.quantization != "none":
        raise ConfigError(
            f"{place}: adapter.type none (full fine-tuning) cannot train a base quantized to {config.quantization}",
            code="E204",
            fix="set quantization: none, or adapter.type: lora",
        )
    return config


def known_keys(path: tuple[Any, ...]) -> list[str]:
    """Return the keys that the section at this path has."""
    return keys_of(RunConfig, path)


def advise_key(path: tuple[Any, ...], found: Any = None) -> str:
    """Return what an unknown key of a config may be meant for; found: what stands under it."""
    return key_advice(RunConfig, path, found)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a config file."""
    result = RunConfig.model_json_schema()
    result["title"] = "mlxlora config"
    return result
