"""Write the ingredients of the embedded demo base model and the quickstart task, all from templates in this file.

    python scripts/make_demo.py corpus OUT  # OUT/data/{train,valid}.jsonl rows {"text"} and OUT/init, a fresh Llama
    python scripts/make_demo.py task OUT    # OUT/{train,valid,test}.jsonl rows {"prompt", "completion"}
    python scripts/make_demo.py pack OUT    # OUT/base of the trained OUT/run/model, in bfloat16

Every run writes the same bytes. No network, no torch. `mlxlora/demo/README.md` has the whole recipe.
"""

import argparse
import json
import random
import shutil
import string
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from shared.tensors import from_float32, load_file, save_file, to_float32
from shared.types import Tensor as Words

Row = dict[str, str]
Slots = dict[str, str]
Stages = tuple[tuple[str, ...], ...]

CORPUS_SEED, TASK_SEED, INIT_SEED = 1, 2, 3
NUM_CORPUS_ROWS = {"train": 21_500, "valid": 500}
CHAT_SHARE = 0.1
NUM_TASK_ROWS = {"train": 720, "valid": 60, "test": 120}
NUM_HELD_OUT_PAIRS = {"valid": 14, "test": 28}

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, BOS, EOS, END = (SPECIAL_TOKENS.index(token) for token in ("<pad>", "<s>", "</s>", "<|end|>"))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCAB_SIZE, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS = 640, 128, 384, 4, 4, 2
HEAD_DIM = HIDDEN_SIZE // NUM_HEADS
MAX_POSITIONS = 512
WEIGHTS = "model.safetensors"
INIT_STD = 0.05


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text."""
    return tuple(text.split())


HER_NAMES = words("Mia Ana Lea Nora Ida Emma Ruth Vera Zoe Tara Lucy Olga Kate Jana Rosa Wilma")
HIS_NAMES = words("Tom Ben Max Paul Leo Omar Felix Hugo Ivan Noah Adam Emil Jack Karl Yusuf Viktor")
ROOMS = words("kitchen bathroom bedroom hall attic cellar garage study nursery pantry library laundry")
POWERED = words("lamp heater fan radio kettle speaker screen oven printer camera")
HINGED = words("door window blind gate")
DEVICES = POWERED + HINGED
SETTINGS = {
    "lamp": "{} percent",
    "screen": "{} percent",
    "heater": "{} degrees",
    "oven": "{} degrees",
    "fan": "level {}",
    "radio": "level {}",
    "speaker": "level {}",
}
COLOURS = words("red blue green yellow white black brown grey pink orange purple silver")
THINGS = words("cup book ball key coat hat spoon jar bag bottle plate pen map shoe towel toy bell clock basket ring")
PLACES = words("table shelf chair floor bed desk bench carpet")
PETS = words("cat dog bird rabbit mouse turtle")
MOODS = words("happy tired cold warm hungry glad busy sleepy calm proud")
WEATHERS = words("rainy sunny windy snowy cloudy foggy")
DAYPARTS = words("morning afternoon evening night")
SYLLABLES = words("ba bo da de di fa fi ga go ka ki ko la li lo ma mi mo na ni no pa pi po ra ri ro sa si so ta ti")
NUMBER_WORDS = words("one two three four five six seven eight nine ten eleven twelve")
# Every ASCII mark occurs: the embeddings of tokens that never do stay so alike that an adapter cannot tell them apart.
MARKS = string.punctuation

# verb, past tense, resulting state
POWER_ACTIONS = (
    ("turn on", "turned on", "on"),
    ("switch on", "switched on", "on"),
    ("start", "started", "on"),
    ("turn off", "turned off", "off"),
    ("switch off", "switched off", "off"),
    ("stop", "stopped", "off"),
)
HINGE_ACTIONS = (("open", "opened", "open"), ("close", "closed", "closed"), ("shut", "shut", "closed"))

# A row draws its slots once, takes one alternative from each stage of one kind and joins them. A slot that comes back
# in a row comes back with the same word, so the corpus rewards copying.
STORIES: dict[str, Stages] = {
    "device": (
        (
            "It was a {weather} {daypart}. {name} was in the {room}.",
            "One {weather} {daypart} {name} came into the {room}.",
            "{name} and {other} were in the {room}.",
            "At {hour} in the {daypart} {name} walked to the {room}.",
            "{name} was {mood} and sat on a {place} in the {room}.",
        ),
        (
            '{other} said: "Please {verb} the {device} in the {room}."',
            '{other} said: "{Verb} the {device} in the {room}, please."',
            '"{Verb} the {room} {device}!" said {other}.',
            '{other} said: "{name}, please go to the {room} and {verb} the {device}."',
            '{other} asked: "Could you {verb} the {device}?"',
            '{name} said: "I will {verb} the {device} now."',
            "{name} wanted to {verb} the {device}, and {other} said yes.",
            '"Can you {verb} the {colour} {device} for me?" asked {other}. It was a small request.',
        ),
        (
            "So {name} {past} the {device}.",
            "{name} {past} the {device} in the {room}.",
            "Then {name} went to the {device} and {past} it.",
            "After {minutes} minutes {name} {past} the {device}.",
        ),
        (
            "Now the {device} in the {room} is {state}.",
            "The {device} was {state}, and {other} was {mood}.",
            "The {device} is {state} now. {other} thanked {name}.",
            "It is {state} until {hour}.",
            "That was the last command of the {daypart}.",
        ),
    ),
    "echo": (
        (
            '"{Verb} the {device} in the {room}," said {name}.',
            '{name} said: "{Verb} the {room} {device}."',
            '{name} said: "Could you please {verb} the {device} in the {room}?"',
            '"Please {verb} the {device} in the {room}," said {name}.',
            '{name} said: "{other}, go to the {room} and {verb} the {device}."',
            '{name} said: "I want you to {verb} the {device} in the {room}."',
            '"Go to the {room} and {verb} the {device}," said {name}.',
        ),
        (
            "So {other} {past} the {device} in the {room}.",
            "{other} went to the {room} and {past} the {device}.",
            "In the {room} {other} {past} the {device}.",
        ),
        (
            "The {device} in the {room} is {state}, and {name} is {mood}.",
            'The {room} {device} is {state}. "Thank you, {other}," said {name}.',
            "Now {other} is in the {room} and the {device} is {state}.",
        ),
        (
            'The list says "{device}" and "{room}" and "{state}".',
            "List: {device} ({room}), {state}.",
            "\n{room}: {device}, {state}",
            "\n({room}) {device}, {state}",
            "\n{room}/{device}",
        ),
    ),
    "dial": (
        (
            '"Set the {dial} in the {room} to {setting}," said {name}.',
            '{name} said: "Please put the {room} {dial} to {setting}."',
            '{name} said: "Could you please set the {dial} in the {room} to {setting}?"',
            '{name} said: "{other}, go to the {room} and set the {dial} to {setting}."',
        ),
        (
            "So {other} set the {dial} in the {room} to {setting}.",
            "{other} went to the {room} and put the {dial} to {setting}.",
        ),
        (
            "The {dial} in the {room} is at {setting}, as {name} said.",
            "{name} thanked {other}. Now the {room} {dial} is at {setting}.",
        ),
        (
            'The list says "{dial}" and "{room}" and "{setting}".',
            "List: {dial} ({room}), {setting}.",
            "\n{room}: {dial}, {setting}",
            "\n({room}) {dial}, {setting}",
        ),
    ),
    "timer": (
        (
            '"{Verb} the {device} in the {room} at {hour} for {minutes} minutes," said {name}.',
            '{name} said: "At {hour}, please {verb} the {room} {device} for {minutes} minutes."',
            '{name} said: "Could you {verb} the {device} in the {room} in {minutes} minutes, at {hour}?"',
        ),
        (
            "So {other} {past} the {device} in the {room}, and {name} was {mood}.",
            "{other} went to the {room} and {past} the {device}.",
            "At {hour} {other} {past} the {device} in the {room}.",
        ),
        (
            "The list says {device}, {room}, {hour}, {minutes}.",
            "{minutes} minutes later {name} came to the {room}.",
            "{minutes} minutes, said {other}, {minutes} minutes in the {room}.",
            '"At {hour}," said {name}, "in the {room}, at {hour}."',
        ),
    ),
    "errand": (
        (
            "{name} said: go to the {room} and {verb} the {device}; then go to the {room2} and {verb2} the {device2}.",
            "There were two jobs: {verb} the {device} in the {room} and {verb2} the {device2} in the {room2}.",
            '"We have to {verb} the {device} in the {room} and {verb2} the {device2} in the {room2}," said {name}.',
        ),
        (
            "First {other} {past} the {device} in the {room}.",
            "So {other} went to the {room} and {past} the {device}.",
            "{other} {past} the {device} first.",
        ),
        (
            "Then {other} {past2} the {device2} in the {room2}.",
            "In the {room2} {she2} {past2} the {device2}.",
            "After that {she2} went to the {room2} and {past2} the {device2}.",
        ),
        (
            "So the {device} is {state} and the {device2} is {state2}.",
            "The {device2} in the {room2} is {state2}, the {device} in the {room} is {state}.",
            "{name} was {mood}.",
        ),
    ),
    "search": (
        (
            "{name} had a {colour} {thing}. One day the {thing} was gone.",
            "{name} lost a {colour} {thing}.",
            "Where was the {colour} {thing}? {name} did not know.",
        ),
        (
            "{She} looked in the {room2}, but there was only a {colour2} {thing2}.",
            "{She} asked {other}. {other} had seen a {thing2} in the {room2}, but no {thing}.",
            "It was not in the {room2} and not in the {room3}.",
        ),
        (
            "At last {she} went to the {room}, and there was the {thing}, under the {place}.",
            "Then {other} found the {thing} on the {place} in the {room}.",
            "The {thing} was in the {room}, on the {place}, next to the {device}.",
        ),
        (
            "{name} put the {colour} {thing} on the {place}.",
            "The {colour} {thing} was in the {room}! {name} was {mood}.",
            "{name} took the {thing} out of the {room}.",
            '"Thank you, {other}," said {name}.',
        ),
    ),
    "setting": (
        (
            "The {dial} in the {room} was at {setting}, and {name} was {mood}.",
            "The {room} {dial} was at {setting}.",
            "{name} looked at the {dial} in the {room}. It said {setting}.",
        ),
        (
            '{She} said: "Set the {dial} in the {room} to {setting2}."',
            '"Put the {room} {dial} to {setting2}, please," {she} said.',
            '"Please make it {setting2}," {she} said, "not {setting}."',
            "{She} wanted {setting2} and not {setting}.",
        ),
        (
            "{other} set the {dial} to {setting2}.",
            "So {other} set it from {setting} to {setting2}.",
            "At {hour} {other} put the {dial} in the {room} to {setting2}.",
        ),
        (
            "Now the {dial} is at {setting2}.",
            "The {dial} in the {room} is at {setting2}.",
            "Before it was at {setting}.",
        ),
    ),
    "clock": (
        (
            "{name} gets up at {hour} and {other} gets up at {hour2}.",
            "The {device} starts at {hour} and the {device2} starts at {hour2}.",
            "{name} has {minutes} minutes for the {room} and {minutes2} minutes for the {room2}.",
        ),
        (
            "At {hour} {name} goes to the {room} to {verb} the {device}.",
            "In {minutes} minutes {name} will {verb} the {device} in the {room}.",
            "At {hour2} {other} will {verb2} the {device2} in the {room2}, in {minutes2} minutes.",
        ),
        (
            "It is {hour} now, so {name} {past} the {device}.",
            "{minutes} minutes later {name} {past} the {device}.",
            "{other} waits for {minutes2} minutes and comes at {hour2}.",
        ),
    ),
    "code": (
        (
            "The code of the {room} {device} is {code}.",
            "{name} wrote {code} on the {place}.",
            "The number on the {thing} is {code}, the number on the {thing2} is {code2}.",
        ),
        (
            "{other} forgot the number.",
            "{name} read it to {other}: {code}.",
            "It is not {code2}.",
            "Nobody in the {room} knew it.",
        ),
        (
            "{name} said {code} again.",
            "So {other} typed {code}.",
            "The {thing} with {code} is {colour}.",
            "It is {code}.",
        ),
    ),
    "pet": (
        (
            "{name} has a {pet} called {word}.",
            "There was a {colour} {pet}. Its name was {word}.",
            "A {pet} named {word} lived in the {room}.",
        ),
        (
            "{word} likes the {colour} {thing} in the {room}.",
            "{word} sleeps on the {place}.",
            "{word} was {mood} in the {daypart}.",
        ),
        (
            '"{word}!" called {name}. "Come to the {room}!"',
            "One {weather} day {word} ran to the {room2} and met {word2}.",
            "{other} looked for {word} in the {room2}.",
        ),
        (
            "So {word} came to {name}.",
            "{word} and {word2} played with the {thing}.",
            "{word} is a {mood} {pet}.",
            "Good night, {word}.",
        ),
    ),
    "label": (
        (
            "{name} wrote a label for each room.",
            "There are labels on the jars.",
            "Here is the list of {name}.",
            "Request list of {name}:",
            "Command list of {name}:",
            "A plan of the house:",
        ),
        (
            "\n{room}: {colour} {thing}\n{room2}: {colour2} {thing2}\n{room3}: {device}\n",
            "\n{device} ({room})\n{device2} ({room2})\n{thing} ({room3})\n",
            "\n1. {verb} the {device} ({room})\n2. {verb2} the {device2} ({room2})\n",
            '\nOn the first is "{room}", on the second is "{room2}", on the third is "{device}".\n',
            "\n{room}{mark}{device}\n{room2}{mark}{device2}\n{room3}{mark}{thing}\n",
            "\n{mark}{room}\n{mark}{room2}\n{mark}{device}\n",
            "\n{device}, {room}, {state}\n{device2}, {room2}, {state2}\n",
        ),
        (
            'So "{room}" is for the {room} and "{room2}" is for the {room2}.',
            'The {device} gets the label "{device}".',
            'In the {room} the label is "{room}".',
            "The first line is for the {room}.",
            "The second line is for the {room2}.",
        ),
    ),
    "question": (
        (
            "The {device} is in the {room} and the {device2} is in the {room2}.",
            "{name} is in the {room}, {other} is in the {room2}.",
            "{name} has the {colour} {thing} and {other} has the {colour2} {thing2}.",
            "{name} {past} the {device} in the {room}. {other} {past2} the {device2} in the {room2}.",
        ),
        ("It is {hour}.", "The {dial} is at {setting}.", "The {daypart} is {weather}.", "They are {mood}."),
    ),
    "count": (
        (
            "There are {count} {thing}s and {count2} {thing2}s in the {room}.",
            "{name} has {count} {thing}s, {other} has {count2} {thing2}s.",
            "{name} counts: {count} {thing}s on the {place}, {count2} {thing2}s on the floor.",
        ),
        ("All {count} {thing}s are {colour}.", "The {count2} {thing2}s are {colour2}.", "{other} counts them too."),
        (
            "So {count} {thing}s and {count2} {thing2}s are there.",
            "The {count} {thing}s stay in the {room}.",
            "That is all in the {room}.",
        ),
    ),
}

# A model this small learns to copy a class of words from rows that name one word of the class, several times.
# Without these three kinds it had not learned to copy rooms after 2500 updates, and no adapter could teach it.
STORY_WEIGHTS = {"echo": 4, "dial": 4, "timer": 4}

TWO_DEVICES = "The {device} is in the {room} and the {device2} is in the {room2}."
TWO_PEOPLE = "{name} is in the {room} and {other} is in the {room2}."
TWO_COLOURS = "The {thing} is {colour}. The {thing2} is {colour2}."
# facts, question, answer: a chat row or the end of a "question" row
DIALOGUES = (
    (TWO_DEVICES, "Where is the {device}?", "The {device} is in the {room}."),
    (TWO_DEVICES, "Where is the {device2}?", "The {device2} is in the {room2}."),
    (TWO_PEOPLE, "Who is in the {room}?", "{name} is in the {room}."),
    (TWO_PEOPLE, "Who is in the {room2}?", "{other} is in the {room2}."),
    (TWO_COLOURS, "Which colour has the {thing}?", "The {thing} is {colour}."),
    (TWO_COLOURS, "Which colour has the {thing2}?", "The {thing2} is {colour2}."),
    ("{name} {past} the {device} at {hour}.", "When?", "At {hour}."),
    ("{name} {past} the {device} in the {room}.", "What is {state}?", "The {device} in the {room}."),
    ("{name} set the {dial} from {setting} to {setting2}.", "What does the {dial} say?", "It says {setting2}."),
    ("The code of the {room} is {code}.", "What is the code?", "The code is {code}."),
    ("Please {verb} the {device} in the {room}.", "What should I do?", "{Verb} the {device} in the {room}."),
    ("Could you please {verb} the {device} in the {room}?", "In which room?", "In the {room}."),
    ("My {pet} is called {word}.", "What is the name of the {pet}?", "It is {word}."),
)

# A request names a device, a room and an action; its completion is "{device}.{action}({room})", with a tail's argument.
POLITE = (
    "please ",
    "could you please ",
    "can you ",
    "could you ",
    "{name}, please ",
    "I want you to ",
    "now ",
    "",
    "",
    "",
)
REQUESTS = {
    "on": (
        "turn on the {device} in the {room}",
        "switch on the {device} in the {room}",
        "switch the {device} in the {room} on",
        "start the {room} {device}",
        "go to the {room} and turn the {device} on",
    ),
    "off": (
        "turn off the {device} in the {room}",
        "switch off the {device} in the {room}",
        "turn the {device} in the {room} off",
        "stop the {room} {device}",
        "go to the {room} and switch the {device} off",
    ),
    "open": (
        "open the {device} in the {room}",
        "open the {room} {device}",
        "go to the {room} and open the {device}",
    ),
    "close": (
        "close the {device} in the {room}",
        "shut the {room} {device}",
        "go to the {room} and shut the {device}",
    ),
    "set": (
        "set the {device} in the {room} to {setting}",
        "set the {room} {device} to {setting}",
        "put the {device} in the {room} to {setting}",
        "go to the {room} and set the {device} to {setting}",
    ),
}
# what the request adds, what the completion adds
TAILS = (
    ("", ""),
    ("", ""),
    (" at {hour}", ", at {hour}"),
    (" in {minutes} minutes", ", in {minutes}"),
    (" for {minutes} minutes", ", for {minutes}"),
)


def invented_word(rng: random.Random) -> str:
    """Return a made-up capitalised word of two or three syllables."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 3)))).capitalize()


def distinct(rng: random.Random, key: str, choices: Sequence[str], *, count: int = 2) -> Slots:
    """Return `count` different words under the names key, key2, key3, ..."""
    return {key + str(i + 1).removeprefix("1"): word for i, word in enumerate(rng.sample(choices, count))}


def draw_devices(rng: random.Random) -> Slots:
    """Return two different devices, each with an action that suits it, and a dial with two settings."""
    slots = distinct(rng, "device", DEVICES)
    for suffix in ("", "2"):
        actions = HINGE_ACTIONS if slots["device" + suffix] in HINGED else POWER_ACTIONS
        verb, past, state = rng.choice(actions)
        slots |= {"verb" + suffix: verb, "past" + suffix: past, "state" + suffix: state}
    slots["Verb"] = slots["verb"].capitalize()
    slots["dial"] = rng.choice(list(SETTINGS))
    settings = [SETTINGS[slots["dial"]].format(number) for number in rng.sample(range(10, 60), 2)]
    return slots | {"setting": settings[0], "setting2": settings[1]}


def draw_slots(rng: random.Random) -> Slots:
    """Return one word for every slot of the corpus templates."""
    name, other = rng.sample(HER_NAMES + HIS_NAMES, 2)
    she, she2 = ("she" if who in HER_NAMES else "he" for who in (name, other))
    slots = {"name": name, "other": other, "she": she, "She": she.capitalize(), "she2": she2}
    slots |= draw_devices(rng)
    slots |= distinct(rng, "room", ROOMS, count=3)
    for key, choices in (("colour", COLOURS), ("thing", THINGS), ("count", NUMBER_WORDS[1:])):
        slots |= distinct(rng, key, choices)
    for key, numbers in (("hour", range(1, 13)), ("minutes", range(2, 60))):
        slots |= distinct(rng, key, [str(number) for number in numbers])
    for key in ("code", "code2"):
        slots[key] = " ".join(rng.choice("0123456789") for _ in range(rng.choice((3, 4, 5))))
    singles = {"place": PLACES, "pet": PETS, "mood": MOODS, "weather": WEATHERS, "daypart": DAYPARTS, "mark": MARKS}
    for key, choices in singles.items():
        slots[key] = rng.choice(choices)
    return slots | {"word": invented_word(rng), "word2": invented_word(rng)}


def story(rng: random.Random) -> str:
    """Return one mini-story, list or question with its answer."""
    kind = rng.choices(list(STORIES), [STORY_WEIGHTS.get(kind, 1) for kind in STORIES])[0]
    text = " ".join(rng.choice(stage) for stage in STORIES[kind]).replace(" \n", "\n").replace("\n ", "\n")
    if kind == "question":
        facts, question, answer = rng.choice(DIALOGUES)
        text += f" {facts}\nQuestion: {question}\nAnswer: {answer}"
    return text.format(**draw_slots(rng))


def chat(rng: random.Random) -> str:
    """Return one dialogue in the chat template's layout, without the leading bos."""
    facts, question, answer = rng.choice(DIALOGUES)
    layout = rng.choice(
        (
            "<|user|>{facts} {question}<|end|><|assistant|>{answer}<|end|>",
            "<|system|>{facts}<|end|><|user|>{question}<|end|><|assistant|>{answer}<|end|>",
            "<|user|>{facts}<|end|><|assistant|>Good.<|end|><|user|>{question}<|end|><|assistant|>{answer}<|end|>",
        )
    )
    return layout.format(facts=facts, question=question, answer=answer).format(**draw_slots(rng))


def corpus_rows() -> dict[str, list[Row]]:
    """Return the pretraining rows {"text"} by split; no text occurs twice."""
    rng = random.Random(CORPUS_SEED)
    texts: dict[str, None] = {}
    while len(texts) < sum(NUM_CORPUS_ROWS.values()):
        texts[chat(rng) if rng.random() < CHAT_SHARE else story(rng)] = None
    rows = iter([{"text": text} for text in texts])
    return {split: [next(rows) for _ in range(count)] for split, count in NUM_CORPUS_ROWS.items()}


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer of VOCAB_SIZE tokens that puts bos in front of every encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL_TOKENS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, BOS)]
    )
    return tokenizer


def model_config() -> dict[str, object]:
    """Return config.json: every linear's input width is a multiple of 64, so 4-bit groups of 64 fit."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "initializer_range": INIT_STD,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "float32",
    }


def tokenizer_config() -> dict[str, object]:
    """Return tokenizer_config.json with the chat template, in which every turn ends in <|end|>."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[EOS],
        "pad_token": SPECIAL_TOKENS[PAD],
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        "chat_template": CHAT_TEMPLATE,
    }


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter under its Hugging Face name, linears as (out, in)."""
    kv_width = NUM_KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN_SIZE)}
    for i in range(NUM_LAYERS):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (HIDDEN_SIZE,),
            f"{layer}.self_attn.q_proj.weight": (HIDDEN_SIZE, HIDDEN_SIZE),
            f"{layer}.self_attn.k_proj.weight": (kv_width, HIDDEN_SIZE),
            f"{layer}.self_attn.v_proj.weight": (kv_width, HIDDEN_SIZE),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN_SIZE, HIDDEN_SIZE),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN_SIZE,),
            f"{layer}.mlp.gate_proj.weight": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            f"{layer}.mlp.up_proj.weight": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            f"{layer}.mlp.down_proj.weight": (HIDDEN_SIZE, INTERMEDIATE_SIZE),
        }
    return shapes | {"model.norm.weight": (HIDDEN_SIZE,)}


def initial_weights() -> dict[str, np.ndarray]:
    """Return random float32 weights: N(0, INIT_STD) for matrices, ones for norms."""
    rng = np.random.default_rng(INIT_SEED)
    return {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else rng.standard_normal(shape, dtype=np.float32) * np.float32(INIT_STD)
        for name, shape in weight_shapes().items()
    }


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: dict[str, object]) -> None:
    """Write one indented JSON object."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_corpus(out: Path) -> None:
    """Write out/data (rows {"text"}) and out/init (an untrained Hugging Face Llama folder)."""
    rows = corpus_rows()
    for split, split_rows in rows.items():
        write_rows(out / "data" / f"{split}.jsonl", split_rows)
    init = out / "init"
    init.mkdir(parents=True, exist_ok=True)
    train_tokenizer(row["text"] for row in rows["train"]).save(str(init / "tokenizer.json"))
    write_json(init / "tokenizer_config.json", tokenizer_config())
    write_json(init / "config.json", model_config())
    # A chat turn ends in <|end|>, a plain text in </s>: generation stops at either.
    write_json(init / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": [EOS, END], "pad_token_id": PAD})
    weights = ((name, Words("F32", values)) for name, values in initial_weights().items())
    save_file(init / WEIGHTS, weights, metadata={"format": "pt"})


def task_row(rng: random.Random, pair: tuple[str, str]) -> Row:
    """Return a spoken request about one (device, room) pair and its formal command."""
    device, room = pair
    actions = ("open", "close") if device in HINGED else ("on", "off", "set") if device in SETTINGS else ("on", "off")
    action = rng.choice(actions)
    said, meant = ("", ", {level}") if action == "set" else rng.choice(TAILS)
    level = str(rng.randint(10, 59))
    slots = {
        "device": device,
        "room": room,
        "name": rng.choice(HER_NAMES + HIS_NAMES),
        "level": level,
        "setting": SETTINGS.get(device, "").format(level),
        "hour": str(rng.randint(1, 12)),
        "minutes": str(rng.randint(2, 59)),
    }
    polite = rng.choice(POLITE)
    mark = "?" if polite.startswith(("could", "can")) else "."
    request = f"{polite}{rng.choice(REQUESTS[action])}{said}{mark}"
    request = request[:1].upper() + request[1:]
    return {
        "prompt": f"Request: {request}\nCommand:".format(**slots),
        "completion": f" {{device}}.{action}({{room}}{meant})".format(**slots),
    }


def split_pairs(rng: random.Random) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield each split with its (device, room) pairs; no pair is in two splits."""
    pairs = [(device, room) for device in DEVICES for room in ROOMS]
    rng.shuffle(pairs)
    for split, count in NUM_HELD_OUT_PAIRS.items():
        yield split, pairs[:count]
        pairs = pairs[count:]
    yield "train", pairs


def task_rows() -> dict[str, list[Row]]:
    """Return the quickstart rows {"prompt", "completion"} by split, the splits' (device, room) pairs disjoint."""
    rng = random.Random(TASK_SEED)
    rows: dict[str, list[Row]] = {}
    for split, pairs in split_pairs(rng):
        unique: dict[str, Row] = {}
        while len(unique) < NUM_TASK_ROWS[split]:
            row = task_row(rng, pairs[len(unique) % len(pairs)])
            unique[row["prompt"]] = row
        rows[split] = list(unique.values())
    return rows


def write_task(out: Path) -> None:
    """Write out/{train,valid,test}.jsonl."""
    for split, rows in task_rows().items():
        write_rows(out / f"{split}.jsonl", rows)


def pack_base(out: Path) -> None:
    """Write out/base from the trained model in out/run/model: bfloat16 weights, the other files as they are."""
    trained, base = out / "run/model", out / "base"
    base.mkdir(exist_ok=True)
    tensors = {name: from_float32(to_float32(tensor), "BF16") for name, tensor in load_file(trained / WEIGHTS).items()}
    save_file(base / WEIGHTS, tensors.items(), metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(trained / name, base / name)
    config = json.loads((trained / "config.json").read_text())
    write_json(base / "config.json", {**config, "dtype": "bfloat16", "torch_dtype": "bfloat16"})


def main() -> None:
    """Run the subcommand named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("corpus", "task", "pack"))
    parser.add_argument("out", type=Path, help="folder to write into")
    arguments = parser.parse_args()
    {"corpus": write_corpus, "task": write_task, "pack": pack_base}[arguments.what](arguments.out)


if __name__ == "__main__":
    main()
