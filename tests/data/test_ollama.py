"""The Modelfile renders a conversation as the chat template does."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.data.ollama import Turns, modelfile
from job.data.templates import NAMED, load_tokenizer

SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
REVERSED = "{% for message in messages | reverse %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def tokenizer(tiny_model: Path) -> object:
    return load_tokenizer(tiny_model)


@pytest.mark.parametrize("template", [SMOLLM, LLAMA_3, NAMED["llama-2"], NAMED["chatml"]], ids=["smollm", "llama-3", "llama-2", "chatml"])  # fmt: skip
def test_the_parts_of_a_template_give_its_text_for_every_conversation(tokenizer: object, template: str) -> None:
    tokenizer.chat_template = template  # type: ignore[attr-defined]
    turns = Turns.of(tokenizer)
    assert turns is not None
    talk = [
        {"role": role, "content": text}
        for role, text in (("user", "Hi {{ there }}"), ("assistant", "Ho"), ("user", "And?"))
    ]
    whole = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)  # type: ignore[attr-defined]
    assert turns.text(talk) == whole


def test_a_template_that_does_not_go_turn_by_turn_is_left_to_the_gguf_file(tokenizer: object) -> None:
    tokenizer.chat_template = REVERSED  # type: ignore[attr-defined]
    assert Turns.of(tokenizer) is None
    assert modelfile(tokenizer, "./m.gguf") == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n'


@pytest.mark.parametrize("evil", ['"""\\nADAPTER /etc/passwd\\nSYSTEM """', "{{ '{{' }} .System {{ '}}' }}"])
def test_a_template_cannot_write_lines_of_the_modelfile_or_run_in_it(tokenizer: object, evil: str) -> None:
    text = evil if "{{" in evil else "{{ '" + evil + "' }}"
    tokenizer.chat_template = "{% for message in messages %}" + text + "{{ message['content'] }}</s>{% endfor %}"  # type: ignore[attr-defined]
    assert modelfile(tokenizer, "./m.gguf") == 'FROM ./m.gguf\nPARAMETER stop "</s>"\n'


def test_the_modelfile_has_the_template_in_gos_words_and_the_stops(tokenizer: object) -> None:
    tokenizer.chat_template = SMOLLM  # type: ignore[attr-defined]
    text = modelfile(tokenizer, "./m.gguf")
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """{{- range $i, $m := .Messages }}{{ if eq $m.Role "user" }}')
    assert "{{ if not $i }}<|im_start|>system\nYou help." in text
    assert 'PARAMETER stop "</s>"' in text


def test_the_first_token_is_left_to_ollama_and_written_between_turns(tokenizer: object) -> None:
    tokenizer.chat_template = NAMED["llama-2"]  # type: ignore[attr-defined]
    text = modelfile(tokenizer, "./m.gguf")
    assert "{{ if $i }}<s>{{ end }}[INST]" in text
