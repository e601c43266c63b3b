"""Chat templates as well-known models have them, in short: reconstructed from their documentation.

Each is written from what the model's card says of its turns: what opens and ends them, how a system
turn is shown, what a generation prompt opens. Tools, images and retrieval are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from chat_model import (
    GEMMA_TEMPLATE,
    GRANITE_TEMPLATE,
    LLAMA3_TEMPLATE,
    LLAMA_TEMPLATE,
    QWEN2_TEMPLATE,
)

HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
MARKED = "<think>\nThe oven is small.\n</think>\n\n"
"""What most models write before they answer."""
OPENED = "The oven is small.\n</think>\n\n"
"""The same, where the prompt has opened it."""


@dataclass(frozen=True, kw_only=True)
class Real:
    """A template with the tokens that its tokenizer has, and what is right for it."""

    template: str | dict[str, str]
    end: str
    """What ends an assistant's turn."""
    eos: str
    bos: str | None = None
    control: tuple[str, ...] = ()
    """Further special tokens."""
    words: tuple[str, ...] = ()
    """Further tokens that are none: a decoder shows them."""
    thoughts: str = ""
    """What a model samples before its answer."""
    arguments: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    """Why it cannot be used."""


def turns(system: str, user: str, assistant: str, ask: str = "", start: str = "") -> str:
    """A template that writes each turn by its role, and nothing else."""
    return (
        start + "{% for m in messages %}{% if m['role'] == 'system' %}" + system
        + "{% elif m['role'] == 'user' %}" + user + "{% else %}" + assistant
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + ask + "{% endif %}"
    )  # fmt: skip


CONTENT = "{{ m['content'] }}"
CHATML = turns(
    f"<|im_start|>system\n{CONTENT}<|im_end|>\n",
    f"<|im_start|>user\n{CONTENT}<|im_end|>\n",
    f"<|im_start|>assistant\n{CONTENT}<|im_end|>\n",
    "<|im_start|>assistant\n",
)
SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
)
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
)
LLAMA2 = (
    SYSTEM_FIRST + "{% for message in messages %}" + ALTERNATE + "{% if loop.first and system %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V1 = (
    "{{ bos_token }}{% for message in messages %}"
    + ALTERNATE
    + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = (
    SYSTEM_FIRST
    + "{{ bos_token }}{% for message in messages %}"
    + ALTERNATE
    + "{% if message['role'] == 'user' %}{% if loop.last and system %}"
    "{{ '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}{% else %}"
    "{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
TEKKEN = turns(
    f"[SYSTEM_PROMPT]{CONTENT}[/SYSTEM_PROMPT]",
    f"[INST]{CONTENT}[/INST]",
    CONTENT + "{{ eos_token }}",
    start="{{ bos_token }}",
)
GEMMA3 = (
    "{{ bos_token }}"
    + SYSTEM_FIRST
    + "{% for message in messages %}"
    + ALTERNATE
    + "{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\n' + (system + '\n\n' if loop.first and system else '') }}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LAST_QUESTION = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
REASONED = (
    "{% set content, reasoning = m['content'], '' %}"
    "{% if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
QWEN3_TURN = (
    REASONED + "<|im_start|>assistant\n{% if loop.index0 > ns.last %}"
    "{{ '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ content.lstrip('\n') + '<|im_end|>\n' }}"
)
QWEN3 = turns(
    f"<|im_start|>system\n{CONTENT}<|im_end|>\n",
    f"<|im_start|>user\n{CONTENT}<|im_end|>\n",
    QWEN3_TURN,
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    LAST_QUESTION,
)
QWEN35 = turns(
    f"<|im_start|>system\n{CONTENT}<|im_end|>\n",
    f"<|im_start|>user\n{CONTENT}<|im_end|>\n",
    QWEN3_TURN,
    "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}",
    LAST_QUESTION,
)
DEEPSEEK_R1 = (
    "{{ bos_token }}" + SYSTEM_FIRST + "{{ system }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% else %}"
    "{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
DEEPSEEK_V3 = DEEPSEEK_R1.replace("<think>\n", "")
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = turns(
    f"<|im_start|>system<|im_sep|>{CONTENT}<|im_end|>",
    f"<|im_start|>user<|im_sep|>{CONTENT}<|im_end|>",
    f"<|im_start|>assistant<|im_sep|>{CONTENT}<|im_end|>",
    "<|im_start|>assistant<|im_sep|>",
)
COMMAND = turns(
    f"<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{CONTENT}<|END_OF_TURN_TOKEN|>",
    f"<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{CONTENT}<|END_OF_TURN_TOKEN|>",
    f"<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{CONTENT}<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "{{ bos_token }}",
)
SMOLLM3 = (
    SYSTEM_FIRST + "{% set think = enable_thinking if enable_thinking is defined else true %}"
    "{{ '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') }}"
    "{{ '\nReasoning Mode: ' + ('/think' if think else '/no_think') + '\n\n' + system }}"
    "{{ '<|im_end|>\n' }}{% for m in messages %}{% if m['role'] == 'user' %}"
    f"<|im_start|>user\n{CONTENT}<|im_end|>\n{{% else %}}<|im_start|>assistant\n"
    "{% if not think %}{{ '<think>\n\n</think>\n' }}{% endif %}"
    "{{ m['content'].lstrip('\n') + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if not think %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}"
)
GLM45 = turns(
    f"<|system|>\n{CONTENT}",
    f"<|user|>\n{CONTENT}",
    REASONED + "<|assistant|>{% if loop.index0 > ns.last and reasoning %}"
    "{{ '\n<think>' + reasoning.strip() + '</think>' }}{% else %}{{ '\n<think></think>' }}{% endif %}"
    "{{ '\n' + content.strip() }}",
    "<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '\n<think></think>' }}{% endif %}",
    "[gMASK]<sop>" + LAST_QUESTION,
)
NEMOTRON = turns(
    f"<|im_start|>system\n{CONTENT}<|im_end|>\n",
    f"<|im_start|>user\n{CONTENT}<|im_end|>\n",
    "{% set c = m['content'] %}"
    "{% if m.reasoning_content is string %}"
    "{% set c = '<think>\n' + m.reasoning_content + '\n</think>\n' + c %}"
    "{% elif '<think>' not in c and '</think>' not in c %}{% set c = '<think></think>' + c %}"
    "{% elif loop.index0 < ns.last %}{% set c = '<think></think>' + c.split('</think>')[-1] %}"
    "{% endif %}{{ '<|im_start|>assistant\n' + c | trim + '<|im_end|>\n' }}",
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<|im_start|>assistant\n<think></think>' }}{% else %}"
    "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    LAST_QUESTION,
)
GPT_OSS = turns(
    f"<|start|>system<|message|>{CONTENT}<|end|>",
    f"<|start|>user<|message|>{CONTENT}<|end|>",
    "{% if m.thinking is string and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}",
    "<|start|>assistant",
)
ZEPHYR = turns(
    CONTENT.join(("<|system|>\n", "{{ eos_token }}\n")),
    CONTENT.join(("<|user|>\n", "{{ eos_token }}\n")),
    CONTENT.join(("<|assistant|>\n", "{{ eos_token }}\n")),
    "<|assistant|>\n",
)
VICUNA = turns(CONTENT + " ", f"USER: {CONTENT} ", f"ASSISTANT: {CONTENT}</s>", "ASSISTANT:")
VICUNA_ENDLESS = turns(
    CONTENT + "\n\n", f"USER: {CONTENT}\n", f"ASSISTANT: {CONTENT}\n", "ASSISTANT:"
)
ALPACA = turns(
    CONTENT + "\n\n",
    f"### Instruction:\n{CONTENT}\n\n",
    f"### Response:\n{CONTENT}\n\n### End\n\n",
    "### Response:\n",
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + m['content'] + eos_token + ('' if loop.last else '\n') }}{% else %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""One that shows no earlier answers."""

IM: dict[str, Any] = {
    "eos": "<|im_end|>",
    "end": "<|im_end|>",
    "control": ("<|im_start|>", "<|endoftext|>"),
}
THINK: dict[str, Any] = {"words": ("<think>", "</think>")}
OLD: dict[str, Any] = {"bos": "<s>", "eos": "</s>", "end": "</s>"}
DEEPSEEK: dict[str, Any] = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "end": "<｜end▁of▁sentence｜>",
    "control": ("<｜User｜>", "<｜Assistant｜>"),
}
LLAMA: dict[str, Any] = {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "end": "<|eot_id|>"}
REAL: dict[str, Real] = {
    "Llama 2": Real(template=LLAMA2, **OLD),
    "Llama 3": Real(template=LLAMA3_TEMPLATE, control=HEADERS, **LLAMA),
    "Llama 3.1": Real(template=LLAMA_TEMPLATE, control=HEADERS, **LLAMA),
    "Mistral v1": Real(template=MISTRAL_V1, **OLD),
    "Mistral v3": Real(template=MISTRAL_V3, control=("[INST]", "[/INST]"), **OLD),
    "Mistral tekken": Real(
        template=TEKKEN,
        control=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        **OLD,
    ),
    "Magistral": Real(
        template=TEKKEN,
        control=("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"),
        thoughts="[THINK]The oven is small.[/THINK]",
        **OLD,
    ),
    "Gemma 2": Real(
        template=GEMMA_TEMPLATE,
        bos="<bos>",
        eos="<eos>",
        end="<end_of_turn>",
        control=("<start_of_turn>", "<end_of_turn>"),
    ),
    "Gemma 3": Real(
        template=GEMMA3,
        bos="<bos>",
        eos="<eos>",
        end="<end_of_turn>",
        control=("<start_of_turn>", "<end_of_turn>"),
    ),
    "Qwen2.5": Real(template=QWEN2_TEMPLATE, **IM),
    "Qwen3": Real(template=QWEN3, thoughts=MARKED, **IM, **THINK),
    "Qwen3, not thinking": Real(
        template=QWEN3, arguments={"enable_thinking": False}, **IM, **THINK
    ),
    "Qwen3.5": Real(template=QWEN35, thoughts=OPENED, **IM, **THINK),
    "Qwen3.5, not thinking": Real(
        template=QWEN35, arguments={"enable_thinking": False}, **IM, **THINK
    ),
    "DeepSeek-R1": Real(template=DEEPSEEK_R1, thoughts=OPENED, **DEEPSEEK, **THINK),
    "DeepSeek-R1, first release": Real(template=DEEPSEEK_V3, thoughts=MARKED, **DEEPSEEK, **THINK),
    "Phi-3": Real(
        template=PHI3,
        eos="<|endoftext|>",
        end="<|end|>",
        control=("<|end|>", "<|user|>", "<|system|>", "<|assistant|>"),
    ),
    "Phi-4": Real(
        template=PHI4,
        eos="<|endoftext|>",
        end="<|im_end|>",
        control=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    ),
    "Granite 3": Real(
        template=GRANITE_TEMPLATE,
        eos="<|end_of_text|>",
        end="<|end_of_text|>",
        control=("<|start_of_role|>", "<|end_of_role|>"),
    ),
    "Command R": Real(
        template={"default": COMMAND, "tool_use": "TOOLS " + COMMAND, "rag": "RAG " + COMMAND},
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        end="<|END_OF_TURN_TOKEN|>",
        control=(
            "<|START_OF_TURN_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
        ),
    ),
    "SmolLM2": Real(
        template=QWEN2_TEMPLATE.replace("Qwen, created by Alibaba Cloud", "SmolLM"), **IM
    ),
    "SmolLM3": Real(template=SMOLLM3, thoughts=MARKED, **IM, **THINK),
    "SmolLM3, not thinking": Real(
        template=SMOLLM3, arguments={"enable_thinking": False}, **IM, **THINK
    ),
    "GLM-4.5": Real(
        template=GLM45,
        eos="<|endoftext|>",
        end="<|user|>",
        control=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        thoughts="\n<think>The oven is small.</think>\n",
        **THINK,
    ),
    "Nemotron 3": Real(template=NEMOTRON, thoughts=OPENED, **IM, **THINK),
    "gpt-oss": Real(
        template=GPT_OSS,
        eos="<|return|>",
        end="<|return|>",
        control=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|endoftext|>"),
        thoughts="<|channel|>analysis<|message|>The oven is small.<|end|><|start|>assistant"
        "<|channel|>final<|message|>",
    ),
    "Zephyr": Real(template=ZEPHYR, **OLD),
    "Vicuna": Real(template=VICUNA, **OLD),
    "Vicuna without an end": Real(template=VICUNA_ENDLESS, **OLD),
    "Alpaca, its end in words": Real(template=ALPACA, bos="<s>", eos="</s>", end="### End"),
    "ChatML": Real(template=CHATML, **IM),
    "ChatML, another end configured": Real(
        template=CHATML,
        eos="<|endoftext|>",
        end="<|im_end|>",
        control=("<|im_start|>", "<|im_end|>"),
    ),
    "OLMo 2": Real(template=OLMO2, bos="<|endoftext|>", eos="<|endoftext|>", end="<|endoftext|>"),
    "a template that forgets answers": Real(
        template=FORGETFUL, refused="drops what an assistant or a user says", **IM
    ),
}
