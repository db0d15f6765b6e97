"""The templates of chat_templates.py once more, with the marks by which transformers and TRL know the assistant.

Between {% generation %} and {% endgeneration %} stands what a model is asked to say, the end of the turn included.
Where a template writes the same for every role, its expression is taken apart.
"""

from __future__ import annotations

from tests.unit import chat_templates as plain
from tests.unit.chat_templates import IM, STYLES, Style

CALLING = {  # styles that write tools, calls or reasoning
    "qwen-3": Style(plain.QWEN_3, IM, eos="<|im_end|>", tail="<|im_end|>"),
    "opens": Style(plain.OPENS, IM, eos="<|im_end|>", tail="<|im_end|>"),
    "deepseek": Style(
        plain.DEEPSEEK, ("<|User|>", "<|Assistant|>", "<|output|>", "<|/output|>", "<|call|>", "<|/call|>", "<|end|>"),
        bos="<|end|>", eos="<|end|>", tail="<|end|>",
    ),
    "marked": Style(plain.MARKED, IM, eos="<|im_end|>", tail="<|im_end|>"),
}  # fmt: skip
ALL = {**STYLES, **CALLING}


def swap(template: str, old: str, new: str) -> str:
    """Return a template with a part replaced that stands in it once."""
    assert template.count(old) == 1, old
    return template.replace(old, new)


def told(text: str) -> str:
    """Return a part that the assistant says, marked."""
    return f"{{% generation %}}{text}{{% endgeneration %}}"


def apart(template: str, whole: str, head: str, said: str, tail: str, *, role: str = "m['role']") -> str:
    """Return a template whose expression is written in three, the middle one marked where the assistant says it."""
    middle = f"{{% if {role} == 'assistant' %}}{told(f'{{{{ {said} }}}}')}{{% else %}}{{{{ {said} }}}}{{% endif %}}"
    return swap(template, whole, f"{{{{ {head} }}}}{middle}{{{{ {tail} }}}}")


END = "{{- '<|im_end|>\\n' }}" + "{%- elif m.role == 'tool' %}"
ENDED = "{{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}" + "{%- elif m.role == 'tool' %}"
CHATML = apart(
    plain.CHATML, "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}",
    "'<|im_start|>' + message['role'] + '\\n'", "message['content'] + '<|im_end|>'", "'\\n'", role="message['role']",
)  # fmt: skip
OPENS_TURN = "{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}"
TEMPLATES = {
    "chatml": CHATML,
    "chatml-other-eos": CHATML,
    "qwen-2.5": apart(
        plain.QWEN_2_5, "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}",
        "'<|im_start|>' + message.role + '\\n'", "message.content + '<|im_end|>'", "'\\n'", role="message.role",
    ),
    "llama-3": apart(
        swap(plain.LLAMA_3, "{% set content = bos_token + content %}", "{{ bos_token }}"), "{{ content }}",
        "content.split('<|end_header_id|>')[0] + '<|end_header_id|>\\n\\n'",
        "content.split('<|end_header_id|>\\n\\n', 1)[1]", "''", role="message['role']",
    ),
    "llama-2": swap(
        plain.LLAMA_2, "{{ ' '  + content.strip() + ' ' + eos_token }}",
        told("{{ ' '  + content.strip() + ' ' + eos_token }}"),
    ),
    "gemma": apart(
        plain.GEMMA, "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}",
        "'<start_of_turn>' + role + '\\n'", "message['content'] | trim + '<end_of_turn>'", "'\\n'",
        role="message['role']",
    ),
    "mistral": swap(
        plain.MISTRAL, "{{- ' ' + message['content']|trim + eos_token }}",
        told("{{- ' ' + message['content']|trim + eos_token }}"),
    ),
    "generation": plain.GENERATION,
    "think": apart(
        plain.THINK, "{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}",
        "'<|im_start|>' + m.role + '\\n'", "content + '<|im_end|>'", "'\\n'",
    ),
    "phi-4": apart(
        plain.PHI_4, "{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}",
        "'<|im_start|>' + m['role'] + '<|im_sep|>'", "m['content'] + '<|im_end|>'", "''",
    ),
    "smollm": apart(
        plain.SMOLLM, "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}",
        "'<|im_start|>' + m['role'] + '\\n'", "m['content'] + '<|im_end|>'", "'\\n'",
    ),
    "granite": apart(
        plain.GRANITE,
        "{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\\n' }}",
        "'<|start_of_role|>' + m['role'] + '<|end_of_role|>'", "m['content'] + '<|end_of_text|>'", "'\\n'",
    ),
    "olmo-2": apart(
        plain.OLMO_2,
        "{{ '<|' + m['role'] + '|>\\n' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}",
        "'<|' + m['role'] + '|>\\n'", "m['content'] + (eos_token if m['role'] == 'assistant' else '')", "''",
    ),
    "phi-3": apart(  # the last turn ends with the conversation
        swap(plain.PHI_3, "{{ eos_token }}", told("{{ eos_token }}")),
        "{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}", "'<|' + m['role'] + '|>\\n'",
        "m['content'] + '<|end|>' + ('\\n' if loop.last else '')", "'' if loop.last else '\\n'",
    ),
    "plain": apart(
        plain.PLAIN,
        "{{ ('User: ' if m['role']=='user' else 'System: ' if m['role']=='system' else 'Assistant: ') + m['content'] "
        "+ ('</s>' if m['role']=='assistant' else '\\n') }}",
        "'User: ' if m['role']=='user' else 'System: ' if m['role']=='system' else 'Assistant: '",
        "m['content'] + ('</s>' if m['role']=='assistant' else '\\n')", "''",
    ),
    "qwen-3": swap(
        swap(
            plain.QWEN_3, "{{- '<|im_start|>assistant\\n' }}{%- if loop.index0",
            "{{- '<|im_start|>assistant\\n' }}{% generation %}{%- if loop.index0",
        ),
        END, ENDED,
    ),
    "opens": swap(
        swap(
            plain.OPENS, OPENS_TURN,
            "{{- '<think>\\n' }}" + told("{{- (m.reasoning_content or '') + '\\n</think>\\n\\n' }}")
            + "{%- endif %}{% generation %}",
        ),
        END, ENDED,
    ),
    "deepseek": swap(
        swap(
            plain.DEEPSEEK, "{{- '<|Assistant|>' + (m.content or '') }}",
            "{{- '<|Assistant|>' }}{% generation %}{{- m.content or '' }}",
        ),
        "{{- eos_token }}{%- endif %}", "{{- eos_token }}{% endgeneration %}{%- endif %}",
    ),
    "marked": plain.MARKED,
}  # fmt: skip

CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]


def said(role: str, content: str, **more: object) -> dict[str, object]:
    """Return a message."""
    return {"role": role, "content": content, **more}


TURNS = [
    said("user", "hello?"), said("assistant", "hello world"), said("user", "naïve 🦊\n"),
    said("assistant", "the\n\nend"), said("user", "assistant\n"), said("assistant", "assistant: user\n\n x"),
]  # fmt: skip
TALKS = {
    "turns": TURNS,
    "system": [said("system", "Be brief."), *TURNS[:4]],
    "tools": [
        said("user", "Rome?"), said("assistant", "", tool_calls=[CALL]), said("tool", "sunny", name="weather"),
        said("assistant", "It is sunny."), said("user", "thanks"), said("assistant", "Bye."),
    ],
    "words and tools": [
        said("user", "Rome?"), said("assistant", "I look.", tool_calls=[CALL], reasoning_content="ask"),
        said("tool", "sunny", name="weather"), said("assistant", "Sunny 🦊.", reasoning_content="so\n"),
    ],
    "reasoning": [said("user", "1+1?"), said("assistant", "2", reasoning_content="add"), *TURNS[:2]],
}  # fmt: skip


def talk_row(name: str, *, as_text: bool) -> dict[str, object]:
    """Return the row of a conversation; as_text: arguments of calls as JSON text, as one template wants them."""
    calls = [CALL if as_text else {**CALL, "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    messages = [{**message, "tool_calls": calls} if "tool_calls" in message else message for message in TALKS[name]]
    return {"messages": messages, "tools": TOOLS} if "tools" in name else {"messages": messages}
