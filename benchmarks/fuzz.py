"""Spoilt files in every reader: each is read, or refused by an error of ours. Anything else is a crash.

    python benchmarks/fuzz.py --count 1000000 [--workers 2] [--seed 0] [--output FILE.json] [--save DIR]
    python benchmarks/fuzz.py --again TARGET:NUMBER      # one input once more, with its traceback

An input is a sound folder with one file spoilt: bytes changed, cut, doubled and mixed, or the tree of its JSON or YAML
with values, keys and branches replaced; which, is a function of (seed, target, number). Checkpoints are sealed again
in every second input, as by somebody who knows how. A reader has 5 s of processor time and 4 GB; a worker that dies
counts as a crash of the input it was at.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import multiprocessing
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import heading, write  # noqa: E402
from shared.adapters.folder import read_adapter  # noqa: E402
from shared.callbacks import Metrics  # noqa: E402
from shared.config_file import load_config  # noqa: E402
from shared.convert.quantize import quantize  # noqa: E402
from shared.data.rows import iterate_rows  # noqa: E402
from shared.errors import MlxloraError  # noqa: E402
from shared.folder import open_folder  # noqa: E402
from shared.quant.quanto_folder import MAP  # noqa: E402
from shared.running import checkpoint  # noqa: E402
from shared.tensors import from_float32, read_header, read_tensor, save_file  # noqa: E402
from shared.types import Tensor  # noqa: E402

INDEX = "model.safetensors.index.json"
SECONDS, MEMORY = 5.0, 4 * 2**30
WIDTH, RANK = 64, 2
SCHEMES = ("affine-4bit-g32", "mxfp4", "nvfp4", "ternary-g32", "nf4-dq", "int8", "quanto-qint4", "quanto-qfloat8",
           "bitnet")  # fmt: skip
WORDS = [
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\n", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"- ",
    b"&a ", b"*a", b"!!python/object:os.system ", b"!!int ", b"!!bool ", b"!!timestamp ",
    b"!!set ", b"!!binary ", b"? ", b"<<: ", b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 30,
    b"7" * 5000, b"[" * 2000, b'{"a":' * 500, b"../", b"step-", b"<|im_end|>", "\u2028".encode(), b"\x80\x04.",
    b"__metadata__",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 32, 64, 2**31, 2**40, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "0", "a", "none", "F32", "U8", "BF16", "affine", "nf4", "qint4", "all-linear", "\ud800", "\0",
    "../x",     "x" * 9000, [], {}, [0, 8], [-1], [2**31, 2**31], [[]], [None], {"": None}, {"a": {"a": {}}},
]  # fmt: skip
ROWS = [
    {"text": "hello"}, {"prompt": "1 + 1 = ", "completion": "2"}, {"text": "é\u2028<|im_end|>"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{"type": "f"}]},
    {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{}"}}]}]},
]  # fmt: skip
FOREIGN = [
    {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{\"name\": \"f\"}"}]},
    {"instruction": "a", "input": "", "output": "b", "system": "s"}, {"question": "a", "answer": "b"},
]  # fmt: skip
CONFIGS = [
    "model: m\ndata: {path: d, max_length: 64, train_on: all, packing: none}\ntrain: {batch_size: 2, updates: 2}\n",
    "# a run\nmodel: org/m\nquantization: affine-4bit-g64\ndata:\n  path: d\nadapter:\n  type: lora\n  rank: 8\n"
    "  targets: [q_proj]\noptimizer: {lr: 1e-4, betas: [0.9, 0.999]}\nschedule: {name: cosine, warmup: 0.03}\n"
    "checkpoint: {every: null}\n",
]
Files = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """A reader, what it reads when all is well, and its share of the inputs."""

    read: Callable[[Path], Any]
    seeds: list[Files]
    spoilt: tuple[str, ...]  # the files that are changed; the others stay
    share: float
    seal: Callable[[Files], None] = lambda files: None


def read_safetensors(folder: Path) -> None:
    """Read every tensor; none may lie outside the file."""
    size = (folder / "t.safetensors").stat().st_size
    for entry in read_header(folder / "t.safetensors").values():
        assert read_tensor(entry).data.nbytes == entry.end - entry.start <= size


def read_model(folder: Path) -> None:
    """Open a model folder, and every quantized module of it."""
    found = open_folder(folder)
    for module, place in found.places.items():
        found.packed(module, shape=place.stored.shape)


def read_rows(folder: Path) -> None:
    """Read the rows of the one file of a folder."""
    for file in folder.iterdir():
        assert all(row.fields for row in iterate_rows(file))


def seal(files: Files) -> None:
    """Make manifest and marker of a spoilt checkpoint right again, where they still are what they should be."""
    try:
        manifest = json.loads(files[checkpoint.MANIFEST_FILE])
        for name, stated in manifest.items():
            stated |= {"size": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        files[checkpoint.MANIFEST_FILE] = json.dumps(manifest).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    files[checkpoint.MARKER] = hashlib.sha256(files[checkpoint.MANIFEST_FILE]).hexdigest().encode()


def files_of(folder: Path) -> Files:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def weights(shape: tuple[int, ...], dtype: str = "F32") -> Tensor:
    return from_float32(np.random.default_rng(0).standard_normal(shape).astype(np.float32), dtype)


def make_model(folder: Path) -> Path:
    """Write a Llama of one layer, without tokenizer."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), WIDTH)
    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        **sizes,
    }
    layer = "model.layers.0."
    linear = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    names = [f"{layer}{n}.weight" for n in linear] + ["model.embed_tokens.weight", "lm_head.weight"]
    norms = [f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight", "model.norm.weight"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    pairs = {name: weights((WIDTH, WIDTH)) for name in names} | {name: weights((WIDTH,)) for name in norms}
    save_file(folder / "model.safetensors", pairs.items(), metadata={"format": "pt"})
    return folder


def make_adapters() -> list[Files]:
    """Return an adapter as PEFT writes it, one with patterns, and one of mlx-lm."""
    module = "model.layers.0.self_attn.q_proj"
    peft = {f"base_model.model.{module}.lora_A.weight": weights((RANK, WIDTH)),
            f"base_model.model.{module}.lora_B.weight": weights((WIDTH, RANK))}  # fmt: skip
    mlx = {f"{module}.lora_a": weights((WIDTH, RANK)), f"{module}.lora_b": weights((RANK, WIDTH))}
    stated = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj"],
              "bias": "none", "use_dora": False, "use_rslora": False, "base_model_name_or_path": "m"}  # fmt: skip
    own = {"fine_tune_type": "lora", "num_layers": 1,
           "lora_parameters": {"rank": RANK, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}}  # fmt: skip
    patterns = {**stated, "r": 4, "rank_pattern": {"q_proj": RANK}, "alpha_pattern": {"q_proj": 2}, "use_rslora": True}
    return [
        {"adapter_config.json": json.dumps(config).encode(), name: packed(tensors)}
        for config, name, tensors in (
            (stated, "adapter_model.safetensors", peft), (patterns, "adapter_model.safetensors", peft),
            (own, "adapters.safetensors", mlx),
        )
    ]  # fmt: skip


def make_rows() -> list[Files]:
    """Return the same rows as lines, as an array, with commas and with tabs; other programs' rows as lines."""
    lines = [json.dumps(row).encode() for row in ROWS]
    foreign = [json.dumps(row).encode() for row in FOREIGN]
    table = b'prompt,completion\n1 + 1 = ,2\n"a, ""b""\nc",d\n'
    return [
        {"train.jsonl": b"\n".join(lines)}, {"train.json": b"[" + b",\n".join(lines) + b"]"}, {"train.csv": table},
        {"train.tsv": table.replace(b",", b"\t")}, {"other.jsonl": b"\n".join(foreign)},
    ]  # fmt: skip


def packed(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the bytes of a safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(Path(folder) / "t", tensors.items(), metadata={"format": "pt"})
        return (Path(folder) / "t").read_bytes()


def make_targets(work: Path) -> dict[str, Target]:
    """Return every reader with sound folders to spoil, made by the writers of this project."""
    plain = make_model(work / "plain")
    models = [files_of(plain)]
    for scheme in SCHEMES:
        quantize(str(plain), scheme=scheme, output=work / scheme)
        models.append(files_of(work / scheme))
    names = read_header(plain / "model.safetensors")
    models.append(models[0] | {INDEX: json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}).encode()})
    state = {"identity": {"data": "0", "settings": {"train.seed": 0}}, "position": 3, "losses": [1.0, 2.0]}
    kept = {"a": weights((2, 3)), "b": weights((4,), "BF16")}
    step = checkpoint.save(work / "kept", checkpoint.Checkpoint(7, kept, kept, state), keep=1)
    metrics = b"".join(json.dumps({"step": n, "loss": 1.5, "lr": 1e-4}).encode() + b"\n" for n in range(1, 4))
    tensors = [
        {"t.safetensors": packed(found)} for found in (kept, {}, {"s": weights(()), "w": weights((0, 3)), **kept})
    ]
    saved = tuple(file.name for file in sorted(step.iterdir()))
    configs = [{"c.yaml": text.encode()} for text in CONFIGS]
    numbers = "metrics.jsonl"
    return {
        "safetensors": Target(read_safetensors, tensors, ("t.safetensors",), 0.3),
        "adapter": Target(read_adapter, make_adapters(), ("adapter_config.json",), 0.15),
        "checkpoint": Target(checkpoint.load, [files_of(step)], saved, 0.15, seal),
        "rows": Target(read_rows, make_rows(), tuple(name for files in make_rows() for name in files), 0.25),
        "metrics": Target(lambda folder: Metrics(folder / numbers).read(), [{numbers: metrics}], (numbers,), 0.08),
        "model": Target(read_model, models, ("config.json", "model.safetensors", INDEX, MAP), 0.05),
        "yaml": Target(lambda folder: load_config(folder / "c.yaml"), configs, ("c.yaml",), 0.02),
    }


def spoil(target: Target, random: Random) -> tuple[int, Files]:
    """Return which sound folder is spoilt, and the contents of the files that change."""
    number = random.randrange(len(target.seeds))
    sound = target.seeds[number]
    name = random.choice([name for name in target.spoilt if name in sound])
    raw = sound[name]
    if random.random() < 0.6:
        raw = spoil_tree(name, raw, random)
    if raw == sound[name] or random.random() < 0.3:
        other = random.choice(target.seeds).get(name, raw)
        for _ in range(random.choice((1, 1, 2, 4))):
            raw = spoil_bytes(raw, other, random)
    files = dict(sound) | {name: raw}
    if random.random() < 0.5:
        target.seal(files)
    return number, {key: value for key, value in files.items() if value != sound[key]}


def spoil_bytes(raw: bytes, other: bytes, random: Random) -> bytes:
    """Return bytes with one change: flipped, set, put in, taken out, doubled, cut off, or joined to another file's."""
    at = random.randrange(min(len(raw), random.choice((16, 2048, len(raw) + 1))) + 1)
    end = min(at + random.choice((1, 1, 2, 4, 8, 64, 1000)), len(raw))
    match random.randrange(7):
        case 0 if at < len(raw):
            return raw[:at] + bytes([raw[at] ^ 1 << random.randrange(8)]) + raw[at + 1 :]
        case 1:
            return raw[:at] + random.randbytes(end - at) + raw[end:]
        case 2:
            return raw[:at] + random.choice(WORDS) + raw[at:]
        case 3:
            return raw[:at] + raw[end:]
        case 4:
            return raw[:end] + raw[at:end] * random.choice((1, 2, 50)) + raw[end:]
        case 5:
            return raw[:at]
        case _:
            return raw[:at] + other[random.randrange(len(other) + 1) :]


def spoil_tree(name: str, raw: bytes, random: Random) -> bytes:
    """Return a file whose tree has other branches: JSON, the header of safetensors, a line of JSONL, or YAML."""
    try:
        if name.endswith(".safetensors"):
            (length,) = struct.unpack("<Q", raw[:8])
            header = json.dumps(change(json.loads(raw[8 : 8 + length]), random)).encode()
            return struct.pack("<Q", len(header)) + header + raw[8 + length :]
        if name.endswith(".jsonl"):
            lines = raw.splitlines()
            at = random.randrange(len(lines))
            lines[at] = json.dumps(change(json.loads(lines[at]), random), ensure_ascii=random.random() < 0.5).encode()
            return b"\n".join(lines)
        if name.endswith(".yaml"):
            tree = change(yaml.load(raw, yaml.CSafeLoader), random)
            return (json.dumps(tree) if random.random() < 0.5 else yaml.dump(tree, Dumper=yaml.CSafeDumper)).encode()
        if name.endswith(".json"):
            return json.dumps(change(json.loads(raw), random)).encode()
    except (ValueError, yaml.YAMLError):  # what JSON cannot write, e.g. 4301 digits or half a character
        pass
    return raw


def change(tree: Any, random: Random) -> Any:
    """Return a tree with one to three of its branches replaced, removed, renamed, doubled or wrapped."""
    tree = json.loads(json.dumps(tree))
    for _ in range(random.choice((1, 1, 2, 3))):
        owners = [node for node in walk(tree) if isinstance(node, dict | list) and node]
        if not owners:
            return random.choice(VALUES)
        owner = random.choice(owners)
        key: Any = random.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
        action = random.randrange(6)
        if action == 0:
            del owner[key]
        elif action == 1 and isinstance(owner, dict):
            owner[random.choice(["", "a", "\ud800", "../x", "__metadata__", key + ".", key.upper()])] = owner[key]
        elif action == 2:
            owner[key] = random.choice([[owner[key]], {"a": owner[key]}, str(owner[key]), owner])
            if owner[key] is owner:
                owner[key] = json.loads(json.dumps({**owner, key: None} if isinstance(owner, dict) else owner[:key]))
        else:
            owner[key] = json.loads(json.dumps(random.choice(VALUES)))
    return tree


def walk(tree: Any) -> list[Any]:
    """Return every node of a tree."""
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tree, *(node for child in inner for node in walk(child))]


class Endless(BaseException):
    """The reader took too long; no `except Exception` on the way may swallow it."""


def expire(_signal: int, _frame: Any) -> None:
    raise Endless


@dataclass
class Found:
    """What became of the inputs of one target."""

    counts: Counter[str]
    slowest_s: float
    crashes: list[tuple[int, str]]


def try_one(target: Target, folders: list[Path], number: int, seed: str) -> tuple[str, str]:
    """Return ("read" | "refused" | "crash" | "hang", what was raised) of one input."""
    chosen, files = spoil(target, Random(f"{seed}:{number}"))
    folder = folders[chosen]
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.read(folder)
        return "read", ""
    except MlxloraError as error:
        return "refused", error.code
    except Endless:
        return "hang", f"longer than {SECONDS:g} s"
    except Exception as error:
        return "crash", f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        for name in files:
            (folder / name).write_bytes(target.seeds[chosen][name])


def work_through(name: str, numbers: range, seed: int, at: Any, answers: Any) -> None:
    """Read the inputs of a range in this process; `at` always holds the number of the one under way."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, expire)
    found = Found(Counter(), 0.0, [])
    with tempfile.TemporaryDirectory() as made:
        targets = make_targets(Path(made))
        folders = lay_out(targets[name], Path(made))
        gc.freeze()
        for number in numbers:
            at.value = number
            began = time.process_time()
            outcome, told = try_one(targets[name], folders, number, f"{seed}:{name}")
            found.slowest_s = max(found.slowest_s, time.process_time() - began)
            found.counts[outcome if outcome != "refused" else told] += 1
            if outcome in ("crash", "hang") and len(found.crashes) < 50:  # what fits into a pipe
                found.crashes.append((number, told))
    answers.put((name, found))


def lay_out(target: Target, work: Path) -> list[Path]:
    """Write the sound folders of a target, and return them; a checkpoint's has its name."""
    folders = []
    for number, files in enumerate(target.seeds):
        folder = work / f"seed-{number}" / "step-000007"
        folder.mkdir(parents=True)
        for name, raw in files.items():
            (folder / name).write_bytes(raw)
        folders.append(folder)
    return folders


def run_part(context: Any, name: str, numbers: range, seed: int, answers: Any) -> tuple[Any, Any]:
    """Start a process on a range of inputs; return it and the number it is at."""
    at = context.Value("q", numbers.start)
    process = context.Process(target=work_through, args=(name, numbers, seed, at, answers), daemon=True)
    process.start()
    return process, at


def fuzz(shares: Mapping[str, int], *, workers: int, seed: int, seconds: float) -> dict[str, Found]:
    """Return what became of all inputs; a process that dies costs the input it was at, and another goes on."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    waiting = [
        (name, range(start, min(start + 10_000, count)))
        for name, count in shares.items()
        for start in range(0, count, 10_000)
    ]
    waiting.sort(key=lambda part: part[1].start / shares[part[0]], reverse=True)  # all readers advance together
    found = {name: Found(Counter(), 0.0, []) for name in shares}
    running: dict[Any, tuple[str, range, Any]] = {}
    end = time.monotonic() + seconds
    while waiting or running:
        if time.monotonic() > end:
            waiting.clear()
        while waiting and len(running) < workers:
            name, numbers = waiting.pop()
            process, at = run_part(context, name, numbers, seed, answers)
            running[process] = (name, numbers, at)
        time.sleep(0.2)
        for process in [process for process in running if not process.is_alive()]:
            name, numbers, at = running.pop(process)
            if not process.exitcode:
                name, part = answers.get()  # of this process, or of one that ended with it
                merge(found[name], part)
            else:
                part = Found(Counter({"crash": 1}), 0.0, [(at.value, f"the process died ({process.exitcode})")])
                merge(found[name], part)
                waiting.append((name, range(at.value + 1, numbers.stop)))
        print(f"\r{sum(sum(one.counts.values()) for one in found.values()):,} inputs", end="", file=sys.stderr)
    return found


def merge(total: Found, part: Found) -> None:
    total.counts.update(part.counts)
    total.slowest_s = max(total.slowest_s, part.slowest_s)
    total.crashes += part.crashes


def again(name: str, number: int, seed: int) -> None:
    """Read one input once more, and let its error through."""
    with tempfile.TemporaryDirectory() as made:
        target = make_targets(Path(made))[name]
        chosen, files = spoil(target, Random(f"{seed}:{name}:{number}"))
        folder = lay_out(target, Path(made))[chosen]
        for key, raw in files.items():
            print(f"{key}: {raw[:2000]!r}")
            (folder / key).write_bytes(raw)
        target.read(folder)


def save(name: str, number: int, seed: int, place: Path) -> None:
    """Keep the spoilt files of an input."""
    with tempfile.TemporaryDirectory() as made:
        _, files = spoil(make_targets(Path(made))[name], Random(f"{seed}:{name}:{number}"))
    folder = place / f"{name}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for key, raw in files.items():
        (folder / key).write_bytes(raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="inputs, all targets together")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="after these nothing more is begun")
    parser.add_argument("--again", metavar="TARGET:NUMBER")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--save", type=Path, help="where inputs that crash are kept")
    options = parser.parse_args()
    if options.again:
        name, number = options.again.split(":")
        again(name, int(number), options.seed)
        return
    with tempfile.TemporaryDirectory() as made:
        targets = make_targets(Path(made))
    shares = {name: round(options.count * target.share) for name, target in targets.items()}
    began = time.monotonic()
    found = fuzz(shares, workers=options.workers, seed=options.seed, seconds=60 * options.minutes)
    table = {
        name: {
            "inputs": sum(one.counts.values()), "read": one.counts["read"], "crashes": len(one.crashes),
            "refused": {key: one.counts[key] for key in sorted(one.counts) if key.startswith("E")},
            "slowest_cpu_s": round(one.slowest_s, 3), "found": sorted(one.crashes)[:20],
        }
        for name, one in found.items()
    }  # fmt: skip
    print(f"\n{'reader':<12}{'inputs':>10}{'read':>10}{'refused':>10}{'crashes':>9}{'slowest, CPU s':>16}")
    for name, row in table.items():
        refused = sum(row["refused"].values())
        print(
            f"{name:<12}{row['inputs']:>10,}{row['read']:>10,}{refused:>10,}{row['crashes']:>9}{row['slowest_cpu_s']:>16}"
        )
        for number, told in row["found"]:
            print(f"  {name}:{number}  {told}")
            if options.save:
                save(name, number, options.seed, options.save)
    total = sum(row["inputs"] for row in table.values())
    result = {"inputs": total, "seed": options.seed, "wall_s": round(time.monotonic() - began), "readers": table}
    write(options.output, {**heading([]), **result})
    sys.exit(1 if any(row["crashes"] for row in table.values()) else 0)


if __name__ == "__main__":
    main()
