"""Which tokens are learned, where templates, rows and settings leave room for a mistake that nobody would see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.data.chat_template import ChatTemplate
from job.data.conversations import Reading, conversation, opened
from job.data.files import LeftOut, Malformed
from job.data.masking import Encoder
from job.data.report import learned_ends
from job.data.templates import LLAMA_2, load_tokenizer, set_chat_template, templates_of
from job.errors import InputError, SettingsError
from job.model.generation import add_ends
from tests.data.chat_templates import OWN, TRL
from tests.data.conftest import Found
from tests.data.test_chat_templates import CALLS, CHAT, TOKENS, TOOLS, template
from tests.data.test_engine import Make, prepared, report

__all__ = ["prepared"]


def lines(folder: Path, rows: list[Any]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


# -- whose words are whose ---------------------------------------------------------------------------------------------


def by_message(used: ChatTemplate, turns: list[dict[str, Any]], tools: Any = None) -> list[str]:
    """What is learned of each of the assistant's messages."""
    messages = used.suited(conversation({"tools": tools}, turns, Reading()).messages or (), tools)
    text, spans = used.marked(messages, {"tools": tools} if tools else {})
    return ["".join(text[first:last] for first, last in group) for group in spans]


@pytest.mark.parametrize("name", [*OWN, *TRL])
def test_each_answer_has_its_own_words_and_its_own_end(name: str) -> None:
    """Phi-3's training template marks its last end-of-sequence apart, so that two answers have three marks."""
    first, second = by_message(template(name), CHAT)
    assert ("Hello." in first, "So long." in first) == (True, False)
    assert ("So long." in second, "Hello." in second) == (True, False)
    (alone,) = by_message(template(name), CHAT[2:])
    assert second.removesuffix("</s>").endswith(alone.removesuffix("</s>"))
    assert "</s>" not in first or "</s>" in second


IN_TWO_PARTS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|a|>{% if m.reasoning_content and loop.last %}{% generation %}"
    "<think>{{ m.reasoning_content }}</think>{% endgeneration %}{% endif %}\n{% generation %}{{ m.content }}<|e|>"
    "{% endgeneration %}\n{% else %}<|u|>{{ m.content }}<|e|>{% endif %}{% endfor %}"
)


def test_an_answer_with_its_reasoning_marked_apart_keeps_it_and_an_earlier_one_is_not_given_it() -> None:
    used = ChatTemplate(IN_TWO_PARTS, TOKENS)
    turns = [{**turn, **({"reasoning_content": "R."} if turn["role"] == "assistant" else {})} for turn in CHAT]
    assert by_message(used, turns) == ["Hello.<|e|>", "<think>R.</think>So long.<|e|>"]
    assert by_message(used, [*turns, *CHAT[:2]]) == ["Hello.<|e|>", "So long.<|e|>", "Hello.<|e|>"]


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "glm4moe", "qwen2_5"])
def test_a_call_and_the_answer_after_it_are_told_apart(name: str) -> None:
    call, answer = by_message(template(name), CALLS, TOOLS)
    assert "look_up" in call
    assert "A light." not in call
    assert "A light." in answer
    assert "look_up" not in answer


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "glm4moe", "qwen2_5"])
def test_a_blank_content_beside_a_call_is_no_obstacle(name: str) -> None:
    turns = [CALLS[0], {**CALLS[1], "content": "\n\n"}, *CALLS[2:]]
    call, answer = by_message(template(name), turns, TOOLS)
    assert ("look_up" in call, "A light." in answer) == (True, True)
    assert "look_up" not in answer


def test_marks_that_depend_on_the_contents_are_refused_and_not_guessed() -> None:
    odd = "{% for m in messages %}{% if m.content == 'Hello.' %}{% generation %}{% endgeneration %}{% endif %}{% generation %}{{ m.content|length }}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(Malformed, match="cannot be told apart by message"):
        by_message(ChatTemplate(odd, TOKENS), CHAT)


@pytest.mark.parametrize("train_on", ["last", "weights"])
def test_the_last_answer_alone_is_learned_with_its_end_in_phi_3s_template(
    read: Callable[..., Found], tokenizer_of: Callable[[str], Any], tmp_path: Path, train_on: str
) -> None:
    turns = [turn | ({"weight": int(turn is CHAT[3])} if train_on == "weights" and turn["role"] == "assistant" else {}) for turn in CHAT]  # fmt: skip
    from tests.data.chat_templates import of_trl

    found = read(
        lines(tmp_path, [{"messages": turns}]),
        template=of_trl("phi3"),
        train_on="last" if train_on == "last" else "assistant",
    )
    assert found.learned()[0].replace(" ", "").replace("\n", "") == "Solong.<|end|></s>"


def test_the_order_of_rows_with_variables_of_their_own_changes_no_label(
    read: Callable[..., Found], tmp_path: Path
) -> None:
    """Qwen3's prompt for an answer without thinking ends with an empty thought, which the model need not write."""
    text = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and enable_thinking is defined and not enable_thinking %}"
        "<think></think>{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    with_, without = ({"messages": CHAT[:2], "chat_template_kwargs": {"enable_thinking": so}} for so in (True, False))
    for rows in ([with_, without], [without, with_]):
        found = read(lines(tmp_path, rows), template=text)
        assert ["think" in learned for learned in found.learned()] == [False, False]
        assert all("Hello." in learned for learned in found.learned())


@pytest.mark.parametrize("layout", ["prompt, completion", "question, answer", "chosen"])
def test_what_train_on_says_holds_for_turns_that_are_part_of_the_prompt(prepared: Make, layout: str) -> None:
    row = {
        "prompt, completion": {"prompt": CHAT[:3], "completion": CHAT[3:]},
        "question, answer": {"prompt": CHAT[:3], "response": "So long."},
        "chosen": {"prompt": CHAT[:3], "chosen": CHAT[3:], "rejected": [{"role": "assistant", "content": "No."}]},
    }[layout]
    asked = {"DATASET_FORMAT": "chosen"} if layout == "chosen" else {}
    learned = {
        train_on: report(prepared([row] * 4, TRAIN_ON=train_on, **asked))["first_row"]["learned"]
        for train_on in ("auto", "assistant", "last", "all")
    }
    assert "Hello." not in learned["auto"] and "So long." in learned["auto"]
    assert "Hello." not in learned["last"] and "So long." in learned["last"]
    assert "Hello." in learned["assistant"] and "Bye" not in learned["assistant"]
    assert all(word in learned["all"] for word in ("Hi", "Hello.", "Bye", "So long."))


def test_the_end_of_a_turn_stops_before_the_mark_that_begins_the_next() -> None:
    """`<|end|>\\n</s>` and `<|end|>\\n<|user|>` have the `<` in common, with which no answer ends."""
    text = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
        "{% else %}{{ eos_token }}{% endif %}"
    )
    assert by_message(ChatTemplate(text, TOKENS), CHAT) == ["Hello.<|end|>\n", "So long.<|end|>\n</s>"]


# -- the end of an answer ----------------------------------------------------------------------------------------------


UNENDED = "{% for m in messages %}[{{ m.role }}]{% generation %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endgeneration %}{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
OTHER_END = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}<unk>\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


def test_a_token_within_an_answer_is_not_taken_for_its_end(prepared: Make, tmp_path: Path) -> None:
    file = tmp_path / "unended.jinja"
    file.write_text(UNENDED, encoding="utf-8")
    turns = [CHAT[0], {"role": "assistant", "content": "<think>Hm.</think> Hello."}]
    for new in ("", "<think>,</think>"):
        with pytest.raises(InputError, match="No train row teaches the end of a turn"):
            prepared([{"messages": turns}] * 4, CHAT_TEMPLATE=str(file), NEW_TOKENS=new)


def test_a_few_rows_that_teach_the_end_do_not_make_up_for_many_that_do_not(prepared: Make, tmp_path: Path) -> None:
    file = tmp_path / "half.jinja"
    file.write_text(UNENDED.replace("{{ m.content }}{% endif %}{% endgeneration %}", "{{ m.content }}{% if 'Bye' in m.content %}{{ eos_token }}{% endif %}{% endif %}{% endgeneration %}"), encoding="utf-8")  # fmt: skip
    rows = [{"messages": [CHAT[0], {"role": "assistant", "content": text}]} for text in ("Bye", *["No end"] * 7)]
    with pytest.raises(InputError, match="Only 1 of 8 train rows teach the end of a turn"):
        prepared(rows, CHAT_TEMPLATE=str(file))


def test_an_answer_that_ends_with_another_token_is_published_to_end_with_it(prepared: Make, tmp_path: Path) -> None:
    """As with ChatML's `<|im_end|>` on a base model whose end of sequence is `<|endoftext|>`."""
    file = tmp_path / "other.jinja"
    file.write_text(OTHER_END, encoding="utf-8")
    run = prepared([{"messages": CHAT}] * 4, CHAT_TEMPLATE=str(file))
    ends = learned_ends(run.paths.data_report_file)
    assert ends == [0]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": 2, "temperature": 0.7, "do_sample": true}', encoding="utf-8"
    )
    for _ in range(2):
        add_ends(folder, ends)
    written = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert (written["eos_token_id"], written["temperature"]) == ([2, 0], 0.7)


@pytest.mark.parametrize("chosen", ["chatml", "llama-2"])
def test_the_models_own_end_stays_the_only_one_where_answers_end_with_it(prepared: Make, chosen: str) -> None:
    run = prepared([{"messages": CHAT}] * 4, CHAT_TEMPLATE=chosen)
    assert learned_ends(run.paths.data_report_file) == [2]
    assert report(run)["end_tokens"] == {"2": 4}


def test_a_token_that_ends_a_part_of_an_answer_is_not_taken_for_the_end_of_answers(
    prepared: Make, tmp_path: Path
) -> None:
    """As gpt-oss' `<|end|>`, which also ends the reasoning, and `</think>` where template marks leave a gap behind it."""
    file = tmp_path / "parts.jinja"
    file.write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}[A]{% generation %}{% if loop.last %}thought<unk>{% endif %}"
        "{{ m.content }}{{ eos_token if loop.last else '<unk>' }}{% endgeneration %}{% else %}[U]{{ m.content }}{% endif %}{% endfor %}"
    )
    run = prepared([{"messages": CHAT}] * 4, CHAT_TEMPLATE=str(file))
    assert learned_ends(run.paths.data_report_file) == [2]


def test_where_everything_is_learned_the_ends_of_answers_within_a_row_count(prepared: Make) -> None:
    for rows in ([*CHAT, CHAT[0]], [*CHAT[:3], {**CHAT[3], "weight": 0}]):
        run = prepared([{"messages": rows}] * 4, TRAIN_ON="all", CHAT_TEMPLATE="llama-2")
        assert report(run)["rows"] == 4


# -- reasoning ---------------------------------------------------------------------------------------------------------


SPLITTING = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def thinking(text: str = "<think>Why.</think>So long.") -> list[dict[str, Any]]:
    return [*CHAT[:3], {"role": "assistant", "content": text}]


def test_reasoning_within_an_answer_that_the_template_cuts_off_is_refused_in_the_last_and_told_of_the_others() -> None:
    used, told = ChatTemplate(SPLITTING, TOKENS), []
    last = thinking()
    with pytest.raises(LeftOut, match=r"the reasoning_content of message 4 \(assistant\), <think>"):
        used.checked(used.render(last), last, None, told.append)
    earlier = [CHAT[0], {"role": "assistant", "content": "<think>Why.</think>Hello."}, *CHAT[2:]]
    used.checked(used.render(earlier), earlier, None, told.append)
    assert told == ["the chat template leaves out the reasoning of earlier answers"]
    asked_again = [*last, {"role": "user", "content": "Really?"}]
    used.checked(used.render(asked_again), asked_again, None, told.append)
    empty = thinking("<think>\n\n</think>\n\nSo long.")
    used.checked(used.render(empty), empty, None, told.append)


@pytest.mark.parametrize(
    "answer",
    [{"content": "2", "reasoning": "R."}, {"content": "2", "thinking": "R."}, {"content": [{"type": "thinking", "thinking": "R."}, {"type": "text", "text": "2"}]}, {"content": "<think>R.</think>\n2"}],
)  # fmt: skip
def test_the_advice_for_reasoning_works_under_every_name_that_it_has(
    prepared: Make, tmp_path: Path, answer: dict[str, Any]
) -> None:
    file = tmp_path / "splitting.jinja"
    file.write_text(SPLITTING.replace("m.content.split", "(m.content if m.content is string else m.content[0].text).split"), encoding="utf-8")  # fmt: skip
    rows = [{"messages": [CHAT[0], {"role": "assistant", **answer}]}] * 4
    with pytest.raises(InputError) as caught:
        prepared(rows, CHAT_TEMPLATE=str(file))
    assert "FT_IGNORED_MESSAGE_KEYS=reasoning_content" in caught.value.hint
    run = prepared(rows, CHAT_TEMPLATE=str(file), IGNORED_MESSAGE_KEYS="reasoning_content")
    assert report(run)["first_row"]["text"].replace(" ", "") == "[user]Hi</s>[assistant]2</s>"


# -- system prompts, templates and tokenizers --------------------------------------------------------------------------


def test_a_blank_system_prompt_is_none_where_it_would_be_folded_or_another_one_is_set(
    read: Callable[..., Found], tmp_path: Path
) -> None:
    """Where it stays it means something: Qwen2.5's template then leaves out the prompt that it begins with otherwise."""
    blank = {"messages": [{"role": "system", "content": " "}, *CHAT[:2]]}
    plain = read(lines(tmp_path, [{"messages": CHAT[:2]}]), template="chatml")
    for role in ("fold", "drop"):
        assert read(lines(tmp_path, [blank]), template="chatml", system_role=role).documents == plain.documents
    assert "system" in read(lines(tmp_path, [blank]), template="chatml").texts()[0]
    asked = Reading(system_prompt="Be brief.")
    assert conversation(blank, blank["messages"], asked).messages == opened(CHAT[:2], asked)


def test_a_system_prompt_for_rows_that_it_cannot_begin_is_refused(prepared: Make) -> None:
    rows = [{"prompt": "Question? ", "completion": "Answer."}] * 4
    with pytest.raises(InputError, match="FT_SYSTEM_PROMPT is set, but no train row is a conversation"):
        prepared(rows, SYSTEM_PROMPT="Be brief.")
    asked = [{"prompt": CHAT[:1], "completion": CHAT[1:2]}]
    told = report(prepared([*rows, *asked], SYSTEM_PROMPT="Be brief.", DEDUPLICATE="true"))["told"]
    assert told["FT_SYSTEM_PROMPT is not put before rows that are no conversations"] == 4
    evaluated = prepared(
        [*asked * 8, *rows], SYSTEM_PROMPT="Be brief.", EVAL_SPLIT="train[8:]", DATASET_SPLIT="train[:8]"
    )
    assert report(evaluated, "eval")["rows"] == 4


def test_a_template_from_windows_begins_with_its_first_character(
    tokenizer_of: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, file = tokenizer_of("chatml"), tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}{{ messages[0].content }}", encoding="utf-8-sig")
    set_chat_template(tokenizer, str(file))
    assert tokenizer.chat_template.startswith("{{ bos_token }}")
    from job.environment import load_settings

    monkeypatch.setenv("FT_CHAT_TEMPLATE", str(file))
    load_settings()
    file.write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(SettingsError, match="is not a text in UTF-8"):
        load_settings()


def test_a_text_without_a_first_token_of_its_own_keeps_its_end_alone_when_cut_from_the_left(
    read: Callable[..., Found], tokenizer_of: Callable[[str], Any], tmp_path: Path
) -> None:
    file = lines(
        tmp_path, [{"text": "Once upon a time there was a lamp that gave light to all who passed by the sea."}]
    )
    whole = read(file, template="chatml")
    cut = read(file, template="chatml", max_length=8, too_long="cut_left")
    assert cut.documents[0][0] == [whole.documents[0][0][0], *whole.documents[0][0][-7:]], "BOS and the last seven"
    tokenizer = tokenizer_of("chatml")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.bos_token = None
    bare = read(file, tokenizer=tokenizer, max_length=8, too_long="cut_left")
    assert bare.documents[0][0] == whole.documents[0][0][-8:]


def test_a_tokenizer_without_a_begin_of_sequence_gets_a_template_that_needs_none(
    tokenizer_of: Callable[[str], Any],
) -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = None
    assert set_chat_template(tokenizer, "auto").startswith("llama-2")
    tokenizer.chat_template, tokenizer.bos_token = None, None
    assert set_chat_template(tokenizer, "auto").startswith("chatml")
    own, _ = templates_of(tokenizer)
    assert not isinstance(
        Encoder(tokenizer, own, train_on="assistant").one(conversation({}, CHAT, Reading())), Malformed
    )
    assert tokenizer.chat_template != LLAMA_2


def test_a_pad_token_that_the_model_has_no_embedding_for_is_not_used(
    prepared: Make,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import job.stages.prepare as stage

    def with_pad(folder: Path) -> Any:
        tokenizer = load_tokenizer(folder)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        return tokenizer

    monkeypatch.setattr(stage, "load_tokenizer", with_pad)
    run = prepared([{"messages": CHAT}] * 4)
    assert load_tokenizer(run.paths.tokenizer_dir).pad_token == "</s>"
    assert "<pad> has no embedding" in capsys.readouterr().out


def test_a_token_without_an_embedding_is_named_where_new_ones_are_to_be_trained(
    prepared: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import job.stages.prepare as stage

    def with_more(folder: Path) -> Any:
        tokenizer = load_tokenizer(folder)
        tokenizer.add_tokens(["<|far|>"])
        return tokenizer

    monkeypatch.setattr(stage, "load_tokenizer", with_more)
    with pytest.raises(InputError, match=r"'<\|far\|>' \(\d+\), for which the model has no embedding"):
        prepared([{"messages": CHAT}] * 4, NEW_TOKENS="<call>")


def test_a_prompt_whose_template_has_tokens_without_an_embedding_is_refused_before_the_training(
    prepared: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import job.stages.prepare as stage

    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", encoding="utf-8")

    def with_more(folder: Path) -> Any:
        tokenizer = load_tokenizer(folder)
        tokenizer.add_tokens(["<|user|>"])
        return tokenizer

    monkeypatch.setattr(stage, "load_tokenizer", with_more)
    with pytest.raises(InputError, match="A prompt of FT_SAMPLE_PROMPTS has the token"):
        prepared([{"text": "The lamp is lit."}] * 4, CHAT_TEMPLATE=str(file))


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_an_adapter_whose_making_changed_the_base_is_refused(made: str) -> None:
    from job.environment.adapter_settings import with_adapters_own
    from job.settings import Settings

    settings = Settings(adapter_name="theirs", _env_file=None)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "init_lora_weights": made}
    with pytest.raises(InputError, match="init_lora_weights") as caught:
        with_adapters_own(settings, config)
    assert "path_initial_model_for_weight_conversion" in caught.value.hint
    for plain in (True, False, "gaussian"):
        assert with_adapters_own(settings, {**config, "init_lora_weights": plain}).lora_r == 8
