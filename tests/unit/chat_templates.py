"""Chat templates as models ship them, and what of each a model has to learn to say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """One template; a supervised turn is `lead + content + tail`."""

    template: str
    special: tuple[str, ...]
    eos: str
    tail: str
    bos: str | None = None
    lead: str = ""
    takes_system: bool = True
    moves_system: bool = False
    trims: bool = False
    closing: str = ""  # behind the last turn


CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN_2_5 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' or not loop.first %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
# Mistral 7B Instruct v0.3 in short: the system text stands only before a user message that comes last.
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + "
    "'[/INST]' }}{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content']|trim + eos_token }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}{%- endfor %}"
)
GENERATION = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Qwen 3 in short: the reasoning of turns before the last question is dropped.
THINK = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{%- set content = m.content %}"
    "{%- if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ ('User: ' if m['role']=='user' else 'System: ' "
    "if m['role']=='system' else 'Assistant: ') + m['content'] + ('</s>' if m['role']=='assistant' else '\\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)

PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
SMOLLM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GRANITE = (
    "{%- for m in messages %}"
    "{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)
# OLMo 2 in short: the end token stands behind answers only, a newline behind all but the last.
OLMO_2 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if m['role'] != 'assistant' or not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# Phi 3 in short: an end token behind the whole conversation only.
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CALLS = (
    "{%- for call in m.tool_calls or [] %}{%- set f = call.function or call %}"
    '{{- \'<tool_call>\\n{"name": "\' + f.name + \'", "arguments": \' }}'
    "{{- f.arguments if f.arguments is string else f.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}"
)
TOOL_LIST = "{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}"
TOOL_SAID = (
    "{%- elif m.role == 'tool' %}{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{- '<|im_start|>user' }}{%- endif %}{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
)
LAST_QUESTION = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
)
# Qwen 3 in short: reasoning behind the last question only, calls and what tools say in the user's name.
QWEN_3 = (
    TOOL_LIST
    + LAST_QUESTION
    + "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}{{- m.content or '' }}"
    "{%- if m.content and m.tool_calls %}{{- '\\n' }}{%- endif %}"
    + CALLS
    + "{{- '<|im_end|>\\n' }}"
    + TOOL_SAID
    + "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# As Qwen 3, but the reasoning is begun for the model, as Qwen 3.5 and DeepSeek R1 do it.
OPENS = QWEN_3.replace(
    "{{- '<|im_start|>assistant\\n' }}{%- endif %}", "{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
# DeepSeek V3 in short: arguments are joined to text, so they have to be text.
DEEPSEEK = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}"
    "{%- elif m.role == 'tool' %}{{- '<|output|>' + m.content + '<|/output|>' }}{%- elif m.role == 'assistant' %}"
    "{{- '<|Assistant|>' + (m.content or '') }}{%- for call in m.tool_calls or [] %}"
    "{{- '<|call|>' + call.function.name + '\\n' + call.function.arguments + '<|/call|>' }}{%- endfor %}"
    "{{- eos_token }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|Assistant|>' }}{%- endif %}"
)
# Gemma 4 in short: what a tool said stands inside the turn that called it, before its words.
INSIDE = (
    "{%- for m in messages %}{%- if m.role != 'tool' %}{{- '<|turn>' + m.role + '\\n' }}"
    "{%- for call in m.tool_calls or [] %}{{- '<call>' + call.function.name + '</call>' }}{%- endfor %}"
    "{%- if m.tool_calls and not loop.last and messages[loop.index0 + 1].role == 'tool' %}"
    "{{- '<said>' + messages[loop.index0 + 1].content + '</said>' }}{%- endif %}"
    "{{- m.content + '<turn|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|turn>assistant\\n' }}{%- endif %}"
)

# Reasoning and calls, with the marks by which transformers and TRL tell what is the assistant's.
MARKED = (
    TOOL_LIST + "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
    "{%- generation %}{%- if m.reasoning_content %}{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}"
    "{%- endif %}{{- m.content or '' }}"
    + CALLS
    + "{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
    + TOOL_SAID
    + "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
STYLES = {
    "chatml": Style(CHATML, IM, eos="<|im_end|>", tail="<|im_end|>"),
    "chatml-other-eos": Style(CHATML, IM, eos="<|endoftext|>", tail="<|im_end|>"),
    "qwen-2.5": Style(QWEN_2_5, IM, eos="<|im_end|>", tail="<|im_end|>"),
    "llama-3": Style(LLAMA_3, HEADERS, bos="<|begin_of_text|>", eos="<|eot_id|>", tail="<|eot_id|>", trims=True),
    "llama-2": Style(LLAMA_2, ("<s>", "</s>"), bos="<s>", eos="</s>", lead=" ", tail=" </s>", trims=True),
    "gemma": Style(
        GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>", eos="<eos>", tail="<end_of_turn>", takes_system=False, trims=True,
    ),
    "mistral": Style(
        MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), bos="<s>", eos="</s>", lead=" ", tail="</s>", trims=True,
        moves_system=True,
    ),
    "generation": Style(GENERATION, IM, eos="<|im_end|>", tail="<|im_end|>"),
    "think": Style(THINK, IM, eos="<|im_end|>", tail="<|im_end|>"),
    "phi-4": Style(PHI_4, (*IM, "<|im_sep|>"), eos="<|im_end|>", tail="<|im_end|>"),
    "smollm": Style(SMOLLM, IM, eos="<|im_end|>", tail="<|im_end|>"),
    "granite": Style(
        GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        eos="<|end_of_text|>", tail="<|end_of_text|>",
    ),
    "olmo-2": Style(OLMO_2, ("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>", tail="<|endoftext|>"),
    "phi-3": Style(
        PHI_3, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"), eos="<|endoftext|>",
        tail="<|end|>", closing="\n<|endoftext|>",
    ),
    "plain": Style(PLAIN, ("<s>", "</s>"), bos="<s>", eos="</s>", tail="</s>"),
}  # fmt: skip
