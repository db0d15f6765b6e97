"""The config: one schema, one place for defaults, and a message that names file, line, key and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from shared.config import RunConfig, schema, validate
from shared.config_file import build_config, load_config, parse_override, parse_yaml, to_yaml
from shared.errors import ConfigError
from shared.problems import FOREIGN, key_paths
from shared.registry import QUANTIZERS
from shared.schemes import named_schemes, parse_scheme
from shared.types import Scheme

GOLDEN = Path(__file__).with_name("golden_config.json")
LEAST = {"model": "m", "data": {"path": "d"}}
HEAD = "model: m\ndata: {path: d}\n"  # two lines: what a test adds starts at line 3


@pytest.fixture
def load(tmp_path):
    """Return a loader of YAML text behind `model` and `data`."""

    def read(text, *, head=HEAD, overrides=()):
        (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else (head + text).encode())
        return load_config(tmp_path / "run.yaml", overrides=overrides)

    return read


def refusal(load, text, **options):
    with pytest.raises(ConfigError) as caught:
        load(text, **options)
    assert str(caught.value).count("\n") <= 2
    return str(caught.value)


# defaults


def test_no_default_moves_unnoticed():
    """Fails when a default changes: change golden_config.json with it, and say so in CHANGELOG.md."""
    assert build_config(LEAST).model_dump(mode="json") == json.loads(GOLDEN.read_text())


def test_an_empty_section_means_its_defaults(load):
    assert load("train:\nadapter: null\n") == build_config(LEAST)


def test_a_resolved_config_reads_back_as_itself(load, tmp_path):
    config = load("train: {epochs: 3}\nadapter: {targets: [q_proj], layers: [0, 1]}\noptimizer: {lr: 3e-5}")
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_the_json_schema_describes_every_key():
    described = schema()
    assert set(described["properties"]) == set(json.loads(GOLDEN.read_text()))
    assert described["title"] == "mlxlora config"


def test_the_run_folder_is_named_after_model_and_data():
    config = build_config({"model": "org/Tiny-1B", "data": {"path": "sets/stories.jsonl"}})
    assert config.output_dir == Path("runs/Tiny-1B-stories")
    assert build_config({**LEAST, "output": "here"}).output_dir == Path("here")


def test_a_loaded_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        build_config(LEAST).model = "other"


# unknown keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizr: {lr: 1}", 'run.yaml:3: unknown key "optimizr"\nfix: did you mean "optimizer"?'),
        (
            "train:\n  seed: 1\n  batch_sise: 2",
            'run.yaml:5: unknown key "train.batch_sise"\nfix: did you mean "batch_size"?',
        ),
        (
            "optimizer: {zzz: 1}",
            'unknown key "optimizer.zzz"\nfix: known: betas, eps, lora_plus_ratio, lr, '
            "max_grad_norm, momentum, name, nesterov, state, weight_decay",
        ),
    ],
)
def test_an_unknown_key_gets_its_line_and_the_nearest_name(load, text, message):
    assert message in refusal(load, text)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("lr=1e-3", '"optimizer.lr"'),
        ("learning_rate=1e-3", '"optimizer.lr"'),
        ("optimizer.learning_rate=1e-3", '"lr"'),
        ("train.num_train_epochs=3", '"epochs"'),
        ("per-device-train-batch-size=3", '"train.batch_size"'),
        ("max_lenght=4", '"data.max_length"'),
        ("every=5", '"evaluation.every" or "checkpoint.every" or "log.every"'),
        ("lora.r=8", '"adapter", with rank'),
    ],
)
def test_a_key_of_another_program_or_another_section_is_told_by_its_whole_path(load, override, meant):
    assert f"fix: did you mean {meant}?" in refusal(load, "", overrides=[override])
    key, _, value = override.partition("=")
    first, _, second = key.partition(".")
    assert f"fix: did you mean {meant}?" in refusal(load, f"{first}: {{{second}: {value}}}" if second else f"{key}: 1")


def test_a_path_as_a_key_is_told_to_be_a_section(load):
    assert "fix: write it as a section: optimizer: {lr: ...}" in refusal(load, "optimizer.lr: 3")


def test_every_key_that_another_program_has_stands_for_one_of_ours():
    assert set(FOREIGN.values()) <= set(key_paths(RunConfig))
    assert not set(FOREIGN) & set(key_paths(RunConfig))


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("data: pc", "data: {path: pc}"),
        ("data: 'a: b'", 'data: {path: "a: b"}'),
        ("data: [pc, pd]", "data: {path: [{path: pc}, ...]}"),
        ("data: {path: [pc, pd]}", "a section for each: [{path: pc}, ...]"),
        ("data: {path: d}\noptimizer: adamw", "optimizer: {name: adamw}"),
        ("data: {path: d}\nadapter: dora", "adapter: {type: dora}"),
    ],
)
def test_a_text_in_a_sections_place_is_written_as_one(load, text, fix):
    assert refusal(load, text, head="model: m\n").endswith(f"\nfix: {fix}")


def test_a_text_in_a_sections_place_is_written_as_an_option(load):
    assert refusal(load, "", overrides=["data=pc"]).endswith("\nfix: --set data.path=pc")


def test_a_typo_is_told_before_the_key_that_it_leaves_missing(load):
    assert 'unknown key "modle"\nfix: did you mean "model"?' in refusal(load, "modle: m\ndata: {path: d}", head="")


@pytest.mark.parametrize(
    ("text", "key"),
    [("batch-size: 4", "batch-size"), ("train: {batch-size: 4}", "train.batch-size"), ("int: 4", "int")],
)
def test_an_unknown_key_with_a_dash_is_named_whole(load, text, key):
    assert f'run.yaml:3: unknown key "{key}"' in refusal(load, text)


@pytest.mark.parametrize("text", ["model: m", "data: {}\nmodel: m", ""])
def test_a_missing_key_is_named_with_the_way_to_set_it(load, text):
    missing = {"model: m": "data", "data: {}\nmodel: m": "data.path", "": "model"}[text]
    message = refusal(load, text, head="")
    assert f'key "{missing}" is missing' in message
    assert f"--set {'data.path' if missing == 'data' else missing}=" in message


# types and ranges


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rank=8.0", "adapter.rank, found 8.0\nexpected: a whole number"),
        ("adapter.layers=first", "expected: 'all' or a whole number or a list: [a, b]"),
        ("data.cache=maybe", "expected: true or false"),
        ("data.columns=5", "expected: a mapping: {name: value}"),
        ("data.columns={promt: x}", 'unknown key "data.columns.promt"\nfix: did you mean "prompt"?'),
        ("data.columns={prompt:x}", "put a blank behind the colon"),
        ("data.path=[{pth: a}]", 'unknown key "data.path.0.pth"\nfix: did you mean "path"?'),
        ("data.path=[a]", "expected: a text or a section with keys such as path, weight"),
        ("data.path=[]", "expected: a text or a list of 1 or more"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "expected: a list of 2 at most"),
        ("schedule.final=2", "expected: 1 or less"),
        ("evaluation.sets={my-set: 3}", "evaluation.sets.my-set, found 3\nexpected: a text"),
        ("evaluation.sets={a b: c}", "expected: letters, digits, - and _"),
        ("adapter.type=lroa", 'fix: did you mean "lora"?'),
        ("train.dtype=fp16", 'fix: did you mean "float16"?'),
        ("device=cuda", 'fix: did you mean "gpu"?'),
        ("backend=cuda", 'fix: did you mean "torch"?'),
        ("output=''", "output, found ''\nexpected: a text that is not empty"),
    ],
)
def test_what_is_expected_is_said_in_words_of_a_config(override, message):
    with pytest.raises(ConfigError) as caught:
        build_config(LEAST, overrides=[override])
    assert message in str(caught.value)
    assert "input" not in str(caught.value).lower()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("optimizer: {lr: .inf}", "optimizer.lr"),
        ("optimizer: {lr: .nan}", "optimizer.lr"),
        ("optimizer: {lr: 1e400}", "optimizer.lr"),
        ("optimizer: {lr: -1}", "optimizer.lr"),
        ("optimizer: {lr: 0}", "optimizer.lr"),
        ("optimizer: {lr: true}", "lr"),
        ("optimizer: {lr: fast}", "optimizer.lr"),
        ("optimizer: {eps: 0}", "optimizer.eps"),
        ("optimizer: {betas: [0.9, 1.0]}", "optimizer.betas"),
        ("optimizer: {weight_decay: -0.1}", "optimizer.weight_decay"),
        ("optimizer: {max_grad_norm: 0}", "optimizer.max_grad_norm"),
        ("optimizer: {name: adamm}", "optimizer.name"),
        ("optimizer: {name: 'os:'}", "optimizer.name"),
        ("optimizer: {momentum: 1}", "optimizer.momentum"),
        ("adapter: {rank: 0}", "adapter.rank"),
        ("adapter: {rank: 8.5}", "adapter.rank"),
        ("adapter: {alpha: 0}", "adapter.alpha"),
        ("adapter: {alpha: yes}", "alpha"),
        ("adapter: {dropout: 1}", "adapter.dropout"),
        ("adapter: {dropout: -0.1}", "adapter.dropout"),
        ("adapter: {targets: []}", "adapter.targets"),
        ("adapter: {targets: [1]}", "adapter.targets"),
        ("adapter: {layers: 0}", "adapter.layers"),
        ("adapter: {layers: []}", "adapter.layers"),
        ("adapter: {layers: [-1]}", "adapter.layers"),
        ("adapter: {layers: true}", "adapter.layers"),
        ("adapter: {type: vera}", "adapter.type"),
        ("schedule: {name: step}", "schedule.name"),
        ("schedule: {name: exponential}", "schedule\nexpected: a final above 0"),
        ("schedule: {cycles: 0}", "schedule.cycles"),
        ("schedule: {decay: 0}", "schedule.decay"),
        ("schedule: {warmup: -1}", "schedule.warmup"),
        ("schedule: {final: 2}", "schedule.final"),
        ("train: {batch_size: 0}", "train.batch_size"),
        ("train: {batch_size: 4.0}", "train.batch_size"),
        ("train: {batch_size: '4'}", "train.batch_size"),
        ("train: {batch_size: true}", "batch_size"),
        ("train: {updates: 5, epochs: 2}", "exactly one of updates and epochs"),
        ("train: {epochs: 1.5}", "train.epochs"),
        ("train: {micro_tokens: 0}", "train.micro_tokens"),
        ("train: {dtype: float8}", "train.dtype"),
        ("train: {recompute: maybe}", "train.recompute"),
        ("train: {seed: -1}", "train.seed"),
        ("train: {seed: 4294967296}", "train.seed"),
        ("evaluation: {every: 0}", "evaluation.every"),
        ("evaluation: {batches: none}", "evaluation.batches"),
        ("checkpoint: {keep: null}", "checkpoint.keep"),
        ("log: {to: [comet]}", "log.to"),
        ("backend: cuda", "backend"),
        ("train: []", "train"),
        ("train: 3", "train"),
        ("output: 5", "output"),
    ],
)
def test_a_value_out_of_type_or_range_names_line_and_key(load, text, key):
    message = refusal(load, text)
    assert message.startswith("run.yaml:3: ")
    assert key in message
    assert "expected: " in message


@pytest.mark.parametrize("text", ["optimizer: {max_grad_norm: true}", "optimizer: {betas: [false, 0.9]}"])
def test_a_switch_is_no_number_anywhere(load, text):
    refusal(load, text)


def test_one_beta_too_few_is_told_as_a_list_of_the_wrong_length(load):
    assert "is missing" not in refusal(load, "optimizer: {betas: [0.9]}")


@pytest.mark.parametrize(
    "key", ["optimizer.max_grad_norm", "evaluation.every", "checkpoint.every", "evaluation.patience"]
)
def test_null_switches_off(key):
    section, name = key.split(".")
    assert getattr(getattr(build_config(LEAST, overrides=[f"{key}=null"]), section), name) is None


def test_exactly_one_of_updates_and_epochs_is_set(load):
    assert (load("train: {epochs: 3}").train.updates, load("train: {epochs: 3}").train.epochs) == (None, 3)
    assert load("train: {updates: null}").train.updates == 500


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_affine_scheme_has_a_name(bits, group):
    assert parse_scheme(f"affine-{bits}bit-g{group}") == Scheme("affine", bits, group)
    assert str(Scheme("affine", bits, group)) == f"affine-{bits}bit-g{group}"


def test_an_unknown_scheme_gets_the_nearest_one(load):
    assert 'did you mean "affine-4bit-g64"?' in refusal(load, "quantization: affine-4bit-g6")
    assert 'did you mean "affine-4bit-g64"?' in refusal(load, "quantization: 4bit")
    assert 'did you mean "nf4"?' in refusal(load, "quantization: nf5")


def test_every_scheme_that_a_config_names_has_a_codec():
    assert {scheme.codec for scheme in named_schemes().values()} <= set(QUANTIZERS)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("nf4", Scheme("nf4", 4, 64)),
        ("fp4-dq", Scheme("fp4", 4, 64, double=True)),
        ("int8", Scheme("int8", 8, 0)),
        ("nvfp4", Scheme("nvfp4", 4, 16)),
        ("ternary-g128", Scheme("ternary", 2, 128)),
        ("quanto-qint4", Scheme("quanto-qint4", 4, 128)),
        ("affine-4bit-g64+hqq", Scheme("affine", 4, 64, solver="hqq")),
    ],
)
def test_every_format_has_a_name_that_reads_back(name, scheme):
    assert named_schemes()[name] == scheme
    assert str(scheme) == name


def test_a_group_that_a_folder_brings_stands_in_the_name():
    assert str(Scheme("nf4", 4, 128, double=True)) == "nf4-g128-dq"


def test_full_fine_tuning_of_a_quantized_base_is_refused(load):
    assert "cannot train a base quantized" in refusal(load, "adapter: {type: none}\nquantization: affine-4bit-g64")


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("5.e-5", 5e-5), (".5", 0.5), ("1", 1.0), ("0.001", 1e-3), ("+1e-3", 1e-3)],
)
def test_a_learning_rate_is_a_number_however_it_is_written(load, text, value):
    assert load(f"optimizer: {{lr: {text}}}").optimizer.lr == value


def test_words_that_yaml_takes_for_switches_do_not_become_text(load):
    assert load("", head="model: m\ndata: {path: d, packing: off}").data.packing == "none"
    assert load("quantization: ~").quantization == "none"
    assert "run.yaml:1: model, found false" in refusal(load, "", head="model: no\ndata: {path: d}")
    assert "run.yaml:1: model, found 123" in refusal(load, "", head="model: 123\ndata: {path: d}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: &x {seed: 1}\nadapter: *x", "run.yaml:3: not valid YAML: anchors"),
        ("train: {seed: *nowhere}", "run.yaml:3: not valid YAML: anchors"),
        ("train: {seed: 1}\ntrain: {seed: 2}", 'run.yaml:4: key "train" stands twice'),
        ("train:\n  seed: 1\n  seed: 2", 'run.yaml:5: key "seed" stands twice'),
        ("train: {seed: 1\n", "run.yaml:4: not valid YAML"),
        ("a: b: c", "run.yaml:3: not valid YAML"),
        ("\ttrain: 1", "run.yaml:3: not valid YAML"),
        ("---\nmodel: x", "not valid YAML: but found another document"),
        ("output: !!python/object/apply:os.getcwd []", "run.yaml:3: not valid YAML: could not determine a constructor"),
        ("output: !custom x", "run.yaml:3: not valid YAML"),
        ("output: 1979-13-45", "a value cannot be read"),
        ("train: {seed: " + "9" * 5000 + "}", "a value cannot be read"),
        ("1: 2", "keys should be strings"),
        ("output: " + "[" * 50 + "]" * 50, "nested deeper than 20 levels"),
        ("output: " + "[" * 50_000, "nested deeper than 20 levels"),
        ("x" * 1_000_001, "run.yaml is larger than 1000000 bytes"),
    ],
)
def test_yaml_that_a_config_does_not_need_is_refused_with_its_line(load, text, message):
    assert message in refusal(load, text)


@pytest.mark.parametrize("text", ["? [a, b]\n: c", "? {a: b}\n: c"])
def test_a_key_that_is_a_list_or_a_mapping_is_refused(load, text):
    assert "run.yaml:3" in refusal(load, text)


def test_files_that_are_no_config_are_refused(load, tmp_path):
    assert "the top level is a list" in refusal(load, "- a", head="")
    assert "the top level is a str" in refusal(load, "hello", head="")
    assert "not UTF-8 at byte 0" in refusal(load, b"\xff\xfe\x00")
    assert "not valid YAML" in refusal(load, b"\x00")
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", '{"text": "a"}\n'), ("x.JSONL", ""), ("x.jsonl.gz", ""), ("x.json.gz", ""), ("x.tsv", ""),
        ("rows.json", ' [{"text": "a"}]'),
    ],
)  # fmt: skip
def test_rows_in_a_configs_place_are_told_to_be_data(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=f"(?s)looks like data.*--data .*{name} --model MODEL"):
        load_config(tmp_path / name)


def test_a_config_may_be_json(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(LEAST))
    assert load_config(tmp_path / "run.json") == build_config(LEAST)


def test_a_byte_order_mark_is_passed_over(load):
    assert load(("\ufeff" + HEAD).encode()).model == "m"


def test_every_key_path_has_its_line():
    _, lines = parse_yaml("a: 1\nb:\n  c: 2\n  d: [x, {e: 3}]\n", name="n")
    assert lines == {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "d"): 4, ("b", "d", 1, "e"): 4}


# overrides


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.batch_size=4", "train.batch_size", 4),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("data.path=a=b", "data.path", "a=b"),
        ("data.path='a b'", "data.path", "a b"),
        ("output=null", "output", None),
        ("adapter.targets=[q_proj, v_proj]", "adapter.targets", ["q_proj", "v_proj"]),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("train={batch_size: 4}", "train.batch_size", 4),
        (" train.seed = 5", "train.seed", 5),
    ],
)
def test_an_override_is_laid_over_the_file(load, text, key, value):
    found = load("train: {seed: 3}", overrides=[text])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_an_override_leaves_the_rest_of_its_section(load):
    assert load("train: {seed: 3, batch_size: 2}", overrides=["train.batch_size=4"]).train.seed == 3


@pytest.mark.parametrize(("value", "found"), [("{}", {}), ("{v_proj: 2}", {"v_proj": 2})])
def test_an_override_replaces_a_setting_that_is_a_mapping(load, value, found):
    text = "adapter: {rank_pattern: {q_proj: 4}, alpha: 3}"
    adapter = load(text, overrides=[f"adapter.rank_pattern={value}"]).adapter
    assert (adapter.rank_pattern, adapter.alpha) == (found, 3)


@pytest.mark.parametrize(("text", "override"), [("updates: 5", "epochs=2"), ("epochs: 5", "updates=2")])
def test_setting_one_length_of_the_run_clears_the_other(load, text, override):
    config = load(f"train: {{{text}}}", overrides=[f"train.{override}"])
    key, value = override.split("=")
    assert config.train.model_dump()[key] == int(value)
    assert None in (config.train.updates, config.train.epochs)


def test_the_last_override_wins(load):
    assert load("train: {updates: 5}", overrides=["train.epochs=2", "train.epochs=3"]).train.epochs == 3


def test_updates_and_epochs_together_are_refused_as_overrides_too(load):
    assert "exactly one of updates and epochs" in refusal(load, "", overrides=["train.updates=5", "train.epochs=2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.lr=1", 'unknown key "train.lr"'),
        ("train.batch-size=4", 'did you mean "batch_size"?'),
        ("optimiser.lr=1", 'did you mean "optimizer"?'),
        ("model.x=3", 'unknown key "model.x"'),
        ("train..seed=1", "unknown key"),
        ("train.batch_size", "has no key=value form"),
        ("=x", "has no key=value form"),
        ("train.seed=[", "not valid YAML"),
        ("train.seed=*x", "aliases"),
        ("train.seed=x", "train.seed, found 'x'"),
    ],
)
def test_an_override_that_cannot_be_used_is_refused(load, text, message):
    assert message in refusal(load, "", overrides=[text])


def test_an_override_cannot_bring_in_a_second_key():
    assert parse_override("train.seed=1\nmodel: x") == {"train": {"seed": 1}}


def test_values_that_come_without_a_file_get_the_same_checks():
    with pytest.raises(ConfigError, match='config: unknown key "modle"'):
        validate({**LEAST, "modle": 1})
    assert yaml.safe_load(to_yaml(build_config(LEAST)))["train"]["updates"] == 500
