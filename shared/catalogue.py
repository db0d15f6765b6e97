"""Every kind of error by its code: what went wrong, why that happens, what to do. `mlxlora explain` prints it.

The first digit is the exit code (8: stopped by a signal, 130 or 143). A code belongs to a kind of mistake, not to a
sentence: sentences may change, codes stay. `python -m shared.catalogue > docs/errors.md` writes the page.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of error: its title, its cause, and the remedy."""

    title: str
    cause: str
    remedy: str


CATALOGUE = {
    "E100": Kind(
        "a bug of mlxlora",
        "Something happened that no check foresaw; its traceback stands above the message.",
        "Report it with that, the command and what `mlxlora doctor --json` prints; the last checkpoint is whole.",
    ),
    "E200": Kind(
        "arguments that do not go together or cannot be used",
        "A command, an option or a value is unknown or malformed, or excludes another one that was given.",
        "The message names the option; `mlxlora COMMAND --help` lists what a command takes.",
    ),
    "E201": Kind(
        "an unknown key in the config",
        "A key is misspelt, in the wrong section, or of another program. Unknown keys are errors: ignored, they would "
        "train something else than was asked for.",
        "Take the name that the message proposes; `mlxlora schema` prints all keys.",
    ),
    "E202": Kind(
        "a setting without a usable value",
        "A value has the wrong type or lies outside its range, or a key that must be set is missing.",
        "The message names file, line and key, what stands there and what is expected.",
    ),
    "E203": Kind(
        "a config file that cannot be read",
        "The file is missing, is no YAML, is not UTF-8, is larger than 1 MB or nested deeper than 20 levels, sets a "
        "key twice, or uses anchors and aliases.",
        "Correct the line that the message names. Tabs cannot indent, and a value with a colon needs quotes.",
    ),
    "E204": Kind(
        "settings that exclude each other, or the model",
        "Each value is fine by itself, but no run has both, or this model does not allow one of them.",
        "Change one of the settings named; the message says which one works.",
    ),
    "E205": Kind(
        "an output that would replace something",
        "The output is a file, the source itself, or a folder with other things in it. Nothing is replaced unasked.",
        "Choose another `--output` (or `output:`), or move what is there.",
    ),
    "E206": Kind(
        "modules or layers that the model does not have",
        "`adapter.targets`, `adapter.layers`, or a pattern of `adapter`, `--override` or `--keep` matches no module.",
        "Take a name that the message lists; `all-linear` fits every model.",
    ),
    "E207": Kind(
        "a run folder that another process is using",
        "Two processes would write over each other, so the second one stops. The lock is the system's: it ends with "
        "its owner.",
        "Wait for the process named or stop it, or choose another `--output`.",
    ),
    "E210": Kind(
        "no data there",
        "The folder, file, split or hub data set does not exist or cannot be reached.",
        "`data.path` is a folder with train.jsonl (or .json, .csv, .tsv, .parquet), such a file, or a hub id.",
    ),
    "E211": Kind(
        "a data file that cannot be read",
        "The file is none of JSON lines, a JSON array, CSV, TSV and Parquet, or a line is no JSON, not UTF-8, nested "
        "too deeply or longer than 50 MB.",
        "Correct the line named: a line of JSONL is one whole object in UTF-8, without a comma behind it.",
    ),
    "E212": Kind(
        "a row that cannot be used",
        'A row is none of {"text"}, {"prompt", "completion"} and {"messages"}, or a field in it is missing, empty or '
        "of the wrong type.",
        "Correct or remove the row named; `mlxlora preview` shows how rows are read.",
    ),
    "E213": Kind(
        "nothing to learn from a row",
        "No token of the row carries loss: the answer is empty, or lies behind `data.max_length`.",
        "Raise `data.max_length`, shorten the prompt, choose another `data.train_on`, or remove the row.",
    ),
    "E214": Kind(
        "a chat template that is missing or fails",
        "Rows with messages need the model's template. It runs in a sandbox: without access to Python, at most 1 s, "
        "256 MB and 1 MB of text. Some templates refuse some conversations on purpose.",
        "Use a chat model, or rows with prompt and completion; else correct the row as the template's words say.",
    ),
    "E215": Kind(
        "a prompt that cannot be answered",
        "It is empty, or has with its answer more tokens than the model has positions.",
        "Shorten the prompt, lower `--max-tokens`, or begin the conversation anew (`/reset`).",
    ),
    "E300": Kind(
        "no model there",
        "The path holds no model folder, or the hub does not know the name or does not let you in.",
        "Check path or name, the network, and HF_TOKEN for private models; a folder needs config.json and safetensors.",
    ),
    "E301": Kind(
        "a file of the model is missing or damaged",
        "A file is absent, cut short or altered, mostly by a download that did not end. Safetensors headers are "
        "checked byte by byte before anything is read.",
        "Download or copy the file again and compare its size with the original.",
    ),
    "E302": Kind(
        "a config.json that describes no model",
        "A value is missing, of the wrong type or out of range, or disagrees with the number of layers in the weights.",
        "Take config.json and weights from the same place; undo changes made by hand.",
    ),
    "E303": Kind(
        "an unknown architecture",
        "The installed mlx-lm or transformers has no model of this `model_type`, or it is laid out in a new way.",
        "Correct `model_type`, try the other backend, or update the library.",
    ),
    "E304": Kind(
        "weights that do not fit the model",
        "Tensors are missing, left over, or of other shapes than config.json says.",
        "Take config.json and weights from the same place.",
    ),
    "E305": Kind(
        "weights that hold NaN or infinity",
        "A file was damaged, or a training that diverged was saved. Nothing can be trained or computed from it.",
        "Download the model again, or use an earlier checkpoint.",
    ),
    "E306": Kind(
        "weights stored as pickle",
        "Files such as pytorch_model.bin can run any code when they are read, so they never are.",
        "Take the safetensors of the same model, or convert it where its origin is trusted (`save_pretrained`).",
    ),
    "E307": Kind(
        "a tokenizer that is missing or does not fit",
        "tokenizer.json is absent or damaged, or gives ids that the model has no embedding for.",
        "Copy tokenizer.json and tokenizer_config.json from the model's origin.",
    ),
    "E308": Kind(
        "quantized weights that are not stored as stated",
        "The packed tensors have other shapes or types than config.json says for their format, or some of them are "
        "missing.",
        "Take config.json and weights from the same place, or quantize the original model again.",
    ),
    "E309": Kind(
        "a model that cannot be used so",
        "The model is sound, but stored in a form that does not allow what was asked: trained as a whole or "
        "quantized again where it is quantized already, for example.",
        "Use the form of the model that the message names, mostly the one before quantization.",
    ),
    "E310": Kind(
        "no adapter there",
        "The folder does not exist, or has no adapter_config.json and adapter weights: a run folder or a whole model, "
        "for example.",
        "Give the `adapter` folder inside the run folder.",
    ),
    "E311": Kind(
        "an adapter that is damaged",
        "A tensor is missing, twice there, not finite, or of another rank than adapter_config.json says; or a file has "
        "another SHA-256 than is noted there.",
        "Copy the adapter again, config and weights of one and the same; or train it again.",
    ),
    "E312": Kind(
        "an adapter that does not fit the base",
        "It was trained on another model: modules are missing or have other widths, or the base is of another "
        "architecture (model type, sizes) than the one that adapter_config.json notes.",
        "Use the base it was trained on; adapter_config.json names it. MLXLORA_ANY_BASE=1 takes any base that it fits.",
    ),
    "E313": Kind(
        "a fused model that would have lost its adapter",
        "The adapter's change is smaller than what the format of the result can hold, so less than 0.9 of it, as a "
        "cosine, would be left. Nothing was written.",
        "Leave out `--scheme` for full precision, keep the adapter beside the base, or give `--accept-loss`.",
    ),
    "E314": Kind(
        "a weight that the format cannot hold",
        "Its width does not divide into the format's groups, its shape is none that the format stores, or its values "
        "are too large for it. The model itself is sound.",
        "Take smaller groups or another scheme, or leave the module as it is: `mlxlora quantize --keep`.",
    ),
    "E320": Kind(
        "no checkpoint there",
        "`--resume` names a folder that does not exist or holds no step-NNNNNN folder.",
        "Leave `--resume` out to go on from the newest checkpoint of the run folder.",
    ),
    "E321": Kind(
        "a checkpoint that is damaged",
        "Marker, sizes or SHA-256 do not match.",
        "Leave `--resume` out to take the newest whole one; `--resume never` starts anew.",
    ),
    "E322": Kind(
        "a checkpoint of another run",
        "The config, the data or the base is not what the run was started with; going on would give a result that "
        "nothing describes.",
        "Undo the change, choose another `--output`, name it with `--allow-change KEY`, or start anew with `--resume "
        "never`.",
    ),
    "E323": Kind(
        "no run there, or one without a result",
        "The folder has no manifest.json, or its run has not come to its end.",
        "`mlxlora runs ls DIR` lists the runs of a folder; let the run end: the same command goes on.",
    ),
    "E324": Kind(
        "a checkpoint of another version",
        "A newer mlxlora wrote it in a format that this one does not read.",
        "Use the mlxlora that wrote it, or a newer one.",
    ),
    "E400": Kind(
        "something this version does not do",
        "The model, adapter or format is sound, but asks for something that would not be computed or written exactly. "
        "It is refused, never approximated in silence.",
        "The message names what works instead.",
    ),
    "E401": Kind(
        "a package or a backend that is not installed",
        "The part asked for needs a package that this Python does not have.",
        "Run the install line of the message; `mlxlora doctor` shows what is there.",
    ),
    "E402": Kind(
        "a device that is not there",
        "A GPU or a second memory was asked for, and the framework finds none.",
        "Set `device: auto`, or install the framework's build for this GPU.",
    ),
    "E403": Kind(
        "code in a model or adapter folder",
        "config.json asks to run Python files of the folder (`auto_map`, `model_file`), or an adapter names code of "
        "its own. That is never done on a folder's word: whoever wrote it would hold your account.",
        "Use a model of an architecture that mlx-lm and transformers have built in; name an adapter's code that you "
        "trust in MLXLORA_OWN_ADAPTERS.",
    ),
    "E404": Kind(
        "an adapter of a kind that is not loaded",
        "The adapter holds or asks for something that has no counterpart here, such as other PEFT types or "
        "parameters.",
        "Train it as LoRA, rsLoRA or DoRA; `mlxlora convert` or the tool it comes from can often write it so.",
    ),
    "E405": Kind(
        "a result that would not be exact",
        "The format asked for cannot hold these weights, this tokenizer or this adapter bit for bit, and nothing is "
        "rounded in silence.",
        "The message names what the format lacks; convert to another format, or from the unquantized model.",
    ),
    "E406": Kind(
        "adapters that have no sum",
        "DoRA scales the base's rows, a module that was trained whole replaces the base's, and of an adapter of your "
        "own nobody knows what a sum would be: such adapters cannot be added to others.",
        "Fuse that adapter into the base, and use the others on the result; or use one at a time.",
    ),
    "E500": Kind(
        "training diverged",
        "Loss, gradients or weights were no longer finite several updates in a row, mostly from a learning rate that "
        "is too high.",
        "Lower `optimizer.lr`, raise `schedule.warmup`, keep `max_grad_norm`; the last good checkpoint is kept.",
    ),
    "E600": Kind(
        "out of memory",
        "The device has no room for the smallest part of an update, or the estimate says beforehand that it "
        "will have none.",
        "Lower `data.max_length`, quantize the base, set `train.recompute: true`; `mlxlora estimate CONFIG --fit` "
        "finds what fits.",
    ),
    "E700": Kind(
        "a file that cannot be written or used",
        "The disk is full, a quota is used up, or permissions or names forbid it. What was saved before is intact.",
        "Free some space or choose another `--output`, and run the same command again: it goes on.",
    ),
    "E800": Kind(
        "stopped by a signal",
        "Ctrl-C, SIGTERM or a closed terminal ended the command; a training run has saved its state.",
        "Run the same command again: it goes on where it stopped.",
    ),
}  # fmt: skip


def exit_code(code: str) -> str:
    """Return the exit code that goes with a code, in words.

    >>> exit_code("E304")
    '3'
    """
    return code[1] if code[1] != "8" else "130 or 143"


def page() -> str:
    """Return docs/errors.md."""
    parts = [
        "# Errors\n\nThe first line of a message has a code, e.g. `error E202: ...`; `mlxlora explain E202` prints its "
        "entry. The first digit is the exit code.\nGenerated by `python -m shared.catalogue > docs/errors.md`.\n"
    ]
    parts += [
        f"## {code}: {kind.title}\n\n{kind.cause}\n\n**Remedy:** {kind.remedy}\n" for code, kind in CATALOGUE.items()
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
