"""What the assistant wrote is found in every well-known template, to the character, and nothing is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.data.chat_template import ChatTemplate
from job.data.conversations import Reading, conversation
from job.data.files import LeftOut, Malformed
from job.data.templates import CHATML, load_tokenizer, templates_of
from tests.data.chat_templates import FORGETFUL, OWN, TRL, of_trl

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *CHAT]
CALL = {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "lamp"}'}}
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Find.", "parameters": {"type": "object", "properties": {"word": {"type": "string"}}}}}]  # fmt: skip
CALLS = [
    {"role": "user", "content": "What is a lamp?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00001", "name": "look_up", "content": "a light"},
    {"role": "assistant", "content": "A light."},
]
REASONED = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2", "reasoning_content": "one and one"},
]

# What each template makes of CHAT, from the first question on. ⟦What the assistant wrote⟧ is marked by hand.
_IM = "Hi<|im_end|>\n<|im_start|>assistant\n⟦{0}Hello.<|im_end|>\n⟧<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦{0}So long.<|im_end|>\n⟧"
_LLAMA_3 = "Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦So long.<|eot_id|>⟧"
_GEMMA = "Hi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>\n⟧<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦So long.<end_of_turn>\n⟧"
_PHI_3 = "Hi<|end|>\n<|assistant|>\n⟦Hello.<|end|>\n⟧<|user|>\nBye<|end|>\n<|assistant|>\n⟦So long.<|end|>\n⟧⟦</s>⟧"
_DEEPSEEK = "Hi⟦<｜Assistant｜>Hello.<｜end▁of▁sentence｜>⟧<｜User｜>Bye⟦<｜Assistant｜>So long.<｜end▁of▁sentence｜>⟧"
_EMPTY = "<think>\n\n</think>\n\n"
MARKED = {
    "llama-2": "Hi [/INST]⟦ Hello. </s>⟧<s>[INST] Bye [/INST]⟦ So long. </s>⟧",
    "chatml": "Hi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|></s>\n⟧<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦So long.<|im_end|></s>\n⟧",
    "mistral-v0.1": "Hi [/INST]⟦Hello.</s>⟧[INST] Bye [/INST]⟦So long.</s>⟧",
    "mistral-v0.3": "Hi[/INST]⟦ Hello.</s>⟧[INST] Bye[/INST]⟦ So long.</s>⟧",
    "zephyr": "Hi</s>\n<|assistant|>\n⟦Hello.</s>\n⟧<|user|>\nBye</s>\n<|assistant|>\n⟦So long.</s>\n⟧",
    "phi-4": "Hi<|im_end|><|im_start|>assistant<|im_sep|>⟦Hello.<|im_end|>⟧<|im_start|>user<|im_sep|>Bye<|im_end|><|im_start|>assistant<|im_sep|>⟦So long.<|im_end|>⟧",
    "smollm3": "Hi<|im_end|>\n⟦<|im_start|>assistant\nHello.<|im_end|>\n⟧<|im_start|>user\nBye<|im_end|>\n⟦<|im_start|>assistant\nSo long.<|im_end|>\n⟧",
    "forgetful": _IM.format(""),
    "llama3": _LLAMA_3,
    "llama3_1": _LLAMA_3,
    "qwen2_5": "Hi<|im_end|>\n<|im_start|>assistant⟦\nHello.<|im_end|>\n⟧<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant⟦\nSo long.<|im_end|>\n⟧",
    "qwen3": _IM.format(_EMPTY),
    "qwen3_instruct_2507": _IM.format(""),
    "qwen3_5_think": _IM.format(_EMPTY),
    "qwen3_6": _IM.format(_EMPTY),
    "gemma": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": _PHI_3,
    "phi3_5": _PHI_3,
    "deepseek_r1_distill": _DEEPSEEK,
    "deepseekv3": _DEEPSEEK,
    "gptoss": "Hi<|end|>⟦<|start|>assistant<|channel|>final<|message|>Hello.<|end|>⟧<|start|>user<|message|>Bye<|end|>⟦<|start|>assistant<|channel|>final<|message|>So long.<|return|>⟧",
    "glm4moe": "Hi<|assistant|>⟦\n<think></think>\nHello.<|user|>⟧\nBye<|assistant|>⟦\n<think></think>\nSo long.<|user|>⟧",
    "cohere": "Hi<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦Hello.<|END_OF_TURN_TOKEN|>⟧<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Bye<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦So long.<|END_OF_TURN_TOKEN|>⟧",
}
# The same of CALLS, from the question on
_QWEN_CALL = '<tool_call>\n{"name": "look_up", "arguments": {"word": "lamp"}}\n</tool_call><|im_end|>\n⟧<|im_start|>user\n<tool_response>\na light\n</tool_response><|im_end|>\n<|im_start|>assistant'
MARKED_CALLS = {
    "mistral-v0.3": 'lamp?[/INST]⟦[TOOL_CALLS] [{"name": "look_up", "arguments": {"word": "lamp"}, "id": "call00001"}]</s>⟧[TOOL_RESULTS] {"content": "a light", "call_id": "call00001"}[/TOOL_RESULTS]⟦ A light.</s>⟧',
    "llama3_1": 'lamp?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦{"name": "look_up", "parameters": {"word": "lamp"}}<|eot_id|>⟧<|start_header_id|>ipython<|end_header_id|>\n\n"a light"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦A light.<|eot_id|>⟧',
    "qwen2_5": f"lamp?<|im_end|>\n<|im_start|>assistant⟦\n{_QWEN_CALL}⟦\nA light.<|im_end|>\n⟧",
    "qwen3": f"lamp?<|im_end|>\n<|im_start|>assistant\n⟦{_EMPTY}{_QWEN_CALL}\n⟦{_EMPTY}A light.<|im_end|>\n⟧",
    "qwen3_instruct_2507": f"lamp?<|im_end|>\n<|im_start|>assistant\n⟦{_QWEN_CALL}\n⟦A light.<|im_end|>\n⟧",
    "qwen3_6": f"lamp?<|im_end|>\n<|im_start|>assistant\n⟦{_EMPTY}<tool_call>\n<function=look_up>\n<parameter=word>\nlamp\n</parameter>\n</function>\n</tool_call><|im_end|>\n⟧<|im_start|>user\n<tool_response>\na light\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦{_EMPTY}A light.<|im_end|>\n⟧",
    "gptoss": 'lamp?<|end|>⟦<|start|>assistant to=functions.look_up<|channel|>commentary json<|message|>{"word": "lamp"}<|call|>⟧<|start|>functions.look_up to=assistant<|channel|>commentary<|message|>"a light"<|end|>⟦<|start|>assistant<|channel|>final<|message|>A light.<|return|>⟧',
    "glm4moe": "lamp?<|assistant|>⟦\n<think></think>\n<tool_call>look_up\n<arg_key>word</arg_key>\n<arg_value>lamp</arg_value>\n</tool_call><|observation|>⟧\n<tool_response>\na light\n</tool_response><|assistant|>⟦\n<think></think>\nA light.<|user|>⟧",
}  # fmt: skip
# The same of REASONED
_THOUGHT = "1+1?<|im_end|>\n<|im_start|>assistant\n⟦<think>\none and one\n</think>\n\n2<|im_end|>\n⟧"
MARKED_REASONED = {
    "qwen3": _THOUGHT, "qwen3_5_think": _THOUGHT, "qwen3_6": _THOUGHT, "forgetful": _THOUGHT,
    "gptoss": "1+1?<|end|>⟦<|start|>assistant<|channel|>analysis<|message|>one and one<|end|><|start|>assistant<|channel|>final<|message|>2<|return|>⟧",
    "glm4moe": "1+1?<|assistant|>⟦\n<think>one and one</think>\n2<|user|>⟧",
}  # fmt: skip


def source(name: str) -> str:
    return OWN[name] if name in OWN else of_trl(name)


def template(name: str) -> ChatTemplate:
    try:
        training = None if name in OWN else of_trl(f"{name}_training")
    except FileNotFoundError:
        training = None
    return ChatTemplate(source(name), TOKENS, training)


def marked(name: str, turns: list[dict[str, Any]], tools: Any = None) -> str:
    """The rendered text with ⟦ and ⟧ around what is learned. Raises Malformed as the job would."""
    used = template(name)
    example = conversation({"tools": tools}, turns, Reading())
    messages = used.suited(example.messages or (), example.tools)
    text, spans = used.marked(messages, {"tools": example.tools} if tools else {})
    used.checked(text, messages, example.tools, lambda _: None)
    for first, last in sorted((span for group in spans for span in group), reverse=True):
        text = f"{text[:first]}⟦{text[first:last]}⟧{text[last:]}"
    return text


@pytest.mark.parametrize("name", [*OWN, *TRL])
def test_the_assistants_turns_are_marked_to_the_character_with_their_ends(name: str) -> None:
    assert marked(name, CHAT).endswith(MARKED[name])


@pytest.mark.parametrize(
    "name", [name for name in (*OWN, *TRL) if name not in ("mistral-v0.1", "mistral-v0.3", "gemma")]
)
def test_a_system_prompt_is_rendered_and_not_learned(name: str) -> None:
    text = marked(name, SYSTEM)
    assert "Be brief." in text
    assert "Be brief." not in "".join(part.split("⟧")[0] for part in text.split("⟦")[1:])
    assert text.endswith(MARKED[name])


@pytest.mark.parametrize("name", ["mistral-v0.1", "mistral-v0.3", "gemma"])
def test_a_system_prompt_that_the_template_does_not_take_is_refused_and_can_be_folded(name: str) -> None:
    with pytest.raises(Malformed):
        marked(name, SYSTEM)
    used = template(name)
    folded = conversation({}, SYSTEM, Reading(system_role="fold")).messages or ()
    text, _ = used.marked(used.suited(folded, None), {})
    assert "Be brief.\n\nHi" in text


@pytest.mark.parametrize("name", MARKED_CALLS)
def test_a_call_is_learned_and_the_tools_answer_is_not(name: str) -> None:
    text = marked(name, CALLS, TOOLS)
    assert text.endswith(MARKED_CALLS[name])
    assert '"look_up"' in text or "look_up" in text.split("⟦")[0]  # the tool is offered
    assert marked(name, [turn | {"content": turn["content"] or ""} for turn in CALLS], TOOLS).endswith(
        MARKED_CALLS[name]
    )


@pytest.mark.parametrize("name", MARKED_REASONED)
def test_reasoning_is_learned(name: str) -> None:
    assert marked(name, REASONED).endswith(MARKED_REASONED[name])
    renamed = [REASONED[0], {"role": "assistant", "content": "2", "thinking": "one and one"}]
    assert marked(name, renamed).endswith(MARKED_REASONED[name])


@pytest.mark.parametrize("name", ["llama-2", "chatml", "mistral-v0.1", "zephyr", "phi-4", "llama3", "gemma", "cohere"])
def test_tools_and_reasoning_that_a_template_does_not_know_are_refused_by_name(name: str) -> None:
    with pytest.raises(LeftOut, match="leaves out the tools"):
        marked(name, CALLS, TOOLS)
    with pytest.raises(Malformed, match=r"the tool_calls of message 2 \(assistant\)|tool|NoneType"):
        marked(name, CALLS)
    with pytest.raises(LeftOut, match="reasoning_content of message 2"):
        marked(name, REASONED)


@pytest.mark.parametrize("name", [*OWN, *TRL])
def test_texts_are_those_of_transformers(name: str, tiny_model: Path) -> None:
    """Apart from today's date, which is pinned here."""
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = source(name)
    tools = TOOLS if name in MARKED_CALLS else None
    used = template(name)
    messages = used.suited((conversation({}, CALLS if tools else CHAT, Reading()).messages) or (), tools)
    for prompted in (False, True):
        mine = used.render(messages, add_generation_prompt=prompted, tools=tools)
        theirs = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompted, tokenize=False)
        if "strftime_now" in source(name):
            mine, theirs = (text[text.rindex("user") :] for text in (mine, theirs))
        assert mine == theirs


@pytest.mark.parametrize("name", [name for name in TRL if name not in ("llama3_1",)])
def test_marks_are_those_of_trls_training_template_token_by_token(name: str, tiny_model: Path) -> None:
    from job.data.masking import Encoder

    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = source(name)
    used, _ = templates_of(tokenizer)
    assert used.marks == "training variant"
    mine = Encoder(tokenizer, used, train_on="assistant").one(conversation({}, CHAT, Reading()))
    theirs = tokenizer.apply_chat_template(
        CHAT,
        chat_template=of_trl(f"{name}_training"),
        return_assistant_tokens_mask=True,
        return_dict=True,
        tokenize=True,
    )
    if "strftime_now" not in source(name):
        assert mine.ids.tolist() == theirs["input_ids"]
    assert mine.learned.tolist()[-60:] == [bool(mark) for mark in theirs["assistant_masks"]][-60:]


def test_earlier_turns_that_a_template_shortens_are_still_told_apart() -> None:
    turns = [
        *REASONED,
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
    ]
    text = marked("forgetful", turns)
    assert text == (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>\n⟧<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\ntwo and two\n</think>\n\n4<|im_end|>\n⟧"
    )
    told: list[str] = []
    used = ChatTemplate(FORGETFUL, TOKENS)
    messages = used.suited(turns, None)
    used.checked(used.render(messages), messages, None, told.append)
    assert told == ["the chat template leaves out the reasoning of earlier answers"]


def test_a_template_that_rewrites_earlier_turns_is_refused_rather_than_mislabelled() -> None:
    counting = ChatTemplate("{% for m in messages %}{{ messages|length }}{{ m.content }}{% endfor %}", TOKENS)
    with pytest.raises(Malformed, match="cannot be told apart"):
        counting.marked(CHAT, {})


def test_four_hundred_turns_take_time_that_grows_with_their_number_only() -> None:
    calls = 0

    class Counting(ChatTemplate):
        def _render(self, *arguments: Any) -> str:
            nonlocal calls
            calls += len(arguments[1])
            return super()._render(*arguments)

    turns = [{"role": role, "content": f"{role} {index}"} for index in range(400) for role in ("user", "assistant")]
    text, spans = Counting(CHATML, TOKENS).marked(turns, {})
    assert len(spans) == 400
    assert [text[first:last] for ((first, last),) in spans] == [
        f"assistant {index}<|im_end|></s>\n" for index in range(400)
    ]
    assert calls < 20 * len(turns)


def test_what_no_template_could_know_is_refused_by_name_and_not_dropped() -> None:
    for key, value in (("score", 3), ("emotion", "calm")):
        with pytest.raises(LeftOut, match=f"the key '{key}' of message 2"):
            marked("chatml", [CHAT[0], CHAT[1] | {key: value}])
    with pytest.raises(LeftOut, match="the name of message 1"):
        marked("chatml", [CHAT[0] | {"name": "Ada"}, CHAT[1]])
    ignored = conversation({}, [CHAT[0] | {"name": "Ada"}, CHAT[1]], Reading(ignored_keys=frozenset({"name"})))
    assert ignored.messages == CHAT[:2]
    assert marked("chatml", [CHAT[0] | {"id": "7", "timestamp": 1}, CHAT[1]])  # these mean nothing to a model
