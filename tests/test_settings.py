"""Settings: one table, every mistake explained at once, and no heavy imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.environment import as_json, load_settings, settings_table
from job.errors import SettingsError
from job.guard.secrets import masked, secret_values
from job.settings import STAGE_NAMES, Settings
from job.stages import STAGES
from job.supervision.ledger import Ledger
from tests.conftest import ROOT

NOTEBOOK_PARAMETERS = """model_name dataset_name new_model lora_r lora_alpha lora_dropout use_4bit bnb_4bit_compute_dtype
bnb_4bit_quant_type use_nested_quant output_dir num_train_epochs fp16 bf16 per_device_train_batch_size
per_device_eval_batch_size gradient_accumulation_steps gradient_checkpointing max_grad_norm learning_rate weight_decay
optim lr_scheduler_type max_steps warmup_ratio group_by_length save_steps logging_steps max_seq_length packing
device_map""".split()


def load(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def refusal(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(monkeypatch, **variables)
    assert caught.value.exit_code == 78
    return str(caught.value)


def test_every_parameter_of_the_notebook_has_a_variable() -> None:
    assert set(NOTEBOOK_PARAMETERS) <= set(Settings.model_fields)


def test_with_nothing_set_the_job_uses_the_default_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch)
    assert (settings.model_name, settings.dataset_name) == (
        "NousResearch/Llama-2-7b-chat-hf",
        "mlabonne/guanaco-llama2-1k",
    )
    assert (settings.lora_r, settings.lora_alpha, settings.lora_dropout) == (64, 16, 0.1)
    assert (settings.use_4bit, settings.bnb_4bit_quant_type, settings.num_train_epochs) == (True, "nf4", 1)
    assert (settings.per_device_train_batch_size, settings.max_grad_norm, settings.learning_rate) == (4, 0.3, 2e-4)
    assert (settings.weight_decay, settings.optim, settings.lr_scheduler_type, settings.warmup_ratio) == (
        0.001,
        "paged_adamw_32bit",
        "cosine",
        0.03,
    )


def test_every_setting_has_a_meaning_and_a_description_of_what_is_allowed() -> None:
    for row in settings_table():
        assert row["meaning"].endswith("."), row
        assert row["allowed"], row


def test_the_stage_names_in_the_settings_match_the_jobs() -> None:
    assert tuple(stage.name for stage in STAGES) == STAGE_NAMES


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("FT_LORA_RANK", "8", "Did you mean FT_LORA_R?"),
        ("FT_LORA_R", "many", "must be a whole number, at least 1 and at most 4096. Or unset it for the default, 64."),
        ("FT_LORA_R", "0", "at least 1"),
        ("FT_LORA_DROPOUT", "1", "less than 1"),
        ("FT_LEARNING_RATE", "-1", "more than 0"),
        ("FT_USE_4BIT", "maybe", "must be true or false"),
        ("FT_BNB_4BIT_QUANT_TYPE", "int4", "nf4, fp4"),
        ("FT_MAX_SEQ_LENGTH", "long", "auto or a whole number"),
        ("FT_MAX_STEPS", "-1", "Or unset it."),
        ("FT_EVAL_SPLIT", "1.5", "must be a fraction between 0 and 1, such as 0.05, or the name of a split"),
        ("FT_EVAL_SPLIT", "5%", "write 5% as a fraction"),
        ("FT_EVAL_SPLIT", "test[:5", "write a part of a split as train[:100]"),
        *[
            ("FT_EVAL_SPLIT", value, "neither a fraction nor the name of a split")
            for value in ("5e-2", "-0.1", "0,05", "nan", "'0.05'", ".")
        ],
        ("FT_DATASET_SPLIT", "train[:24", "such as train[:100]"),
        ("FT_DATASET_ENCODING", "utf-9", "the name of an encoding, such as utf-8"),
        ("FT_DATASET_ENCODING", "hex", "no such encoding of text"),
        ("FT_DATASET_SEPARATOR", ";;", "must be a single character"),
        ("FT_DATASET_SEPARATOR", '"', "must be a single character"),
        ("FT_DATASET_COLUMNS", "[" * 100_000, "nested too deeply"),
        ("FT_LORA_TARGET_MODULES", ",", "names no layers"),
        ("FT_LORA_TARGET_MODULES", "all-linear,", "names no layers"),
        ("FT_GPU_PRICE", "1e308", "must be a number above 0"),
        ("FT_DATASET_ROLES", '{"agent": "asistant"}', "did you mean assistant?"),
        ("FT_GPU_PRICE", "0", "must be a number above 0"),
        ("FT_RUN_ID", "my run/1", "letters, digits, dots, dashes and underscores"),
        ("FT_DATASET_NAME", "https://huggingface.co/datasets/me/rows", "Write user/name for the Hub"),
        ("FT_DATASET_NAME", "me/rows, hf://me/more", "Write user/name for the Hub"),
        ("FT_DATASET_NAME", r"C:\data\rows.jsonl", "Write user/name for the Hub"),
        ("FT_DATASET_NAME", "s3://", "no bucket is named"),
        ("FT_MODEL_NAME", "https://huggingface.co/me/model", "Write user/name for the Hub"),
        ("FT_STORE_URL", "s3://", "names no bucket"),
        ("FT_STORE_URL", "s3:///runs", "names no bucket"),
        ("FT_STORE_URL", "s3://AKIA:secret@bucket/runs", "a URL must not hold keys"),
        ("FT_PUBLISH_TO", "s3://AKIA:secret@bucket/models", "a URL must not hold keys"),
        ("FT_DATASET_NAME", "s3://AKIA:secret@bucket/rows", "a URL must not hold keys"),
        ("FT_OUTPUT_DIR", str(ROOT / "README.md"), "must be a folder, and is a file"),
        ("FT_STORE_URL", f"file://{ROOT / 'README.md'}", "must be a folder, and is a file"),
        ("FT_HF_TOKEN", "hf_x", "Did you mean HF_TOKEN?"),
        ("FT_MODEL", "me/model", "Did you mean FT_MODEL_NAME or FT_NEW_MODEL?"),
        ("FT_BATCH_SIZE", "8", "Did you mean FT_PER_DEVICE_TRAIN_BATCH_SIZE or"),
        ("FT_EPOCHS", "3", "Did you mean FT_NUM_TRAIN_EPOCHS?"),
        ("FT_LR", "1e-3", "FT_LEARNING_RATE"),
        ("FT_STAGES", "train,fly", "preflight, download, prepare"),
        ("FT_SAMPLE_PROMPTS", "hello", "FT_SAMPLE_PROMPTS='hello': must be a list of text"),
        ("FT_RUN_ID", "../escape", "FT_RUN_ID"),
        ("FT_OPTIM", "adamw_trch", "Did you mean adamw_torch?"),
        ("FT_LR_SCHEDULER_TYPE", "cosinus", "Did you mean cosine"),
        ("FT_STORE_URL", "gs://bucket", "must be a folder or s3://"),
        ("FT_PUBLISH_TO", "hf://me/model", "needs HF_TOKEN"),
        ("FT_EVAL_STEPS", "5", "set FT_EVAL_SPLIT too"),
        ("FT_CHAT_TEMPLATE", "llama2", "use auto, llama-2 or chatml"),
        ("FT_DEVICE_MAP", "{bad", "is not a JSON object"),
        ("FT_EXTRA_TRAINING_ARGS", "{'a': 1}", "must be a JSON object"),
        ("FT_EXTRA_TRAINING_ARGS", '{"adam_beta_1": 0.8}', "Did you mean 'adam_beta1'?"),
        ("FT_EXTRA_TRAINING_ARGS", '{"learning_rate": 1}', "set FT_LEARNING_RATE"),
        ("FT_EXTRA_TRAINING_ARGS", '{"push_to_hub": true}', "decided by the job"),
    ],
)
def test_a_mistake_is_reported_with_what_is_allowed_and_how_to_fix_it(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, told: str
) -> None:
    message = refusal(monkeypatch, **{variable: value})
    assert variable in message
    assert told in message


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"FT_FROZEN_PRECISION": "fp8", "FT_DECODER_LAYERS": "plain"}, "FT_FROZEN_PRECISION=fp8 and FT_DECODER_LAYERS=plain"),
        ({"FT_FROZEN_PRECISION": "fp8", "FT_RESIDENT_WEIGHTS": "false"}, "leave FT_RESIDENT_WEIGHTS at auto"),
        ({"FT_FROZEN_PRECISION": "fp8", "FT_DEVICE": "cpu"}, "unset it for FT_DEVICE=cpu"),
        ({"FT_DECODER_LAYERS": "fused", "FT_PADDING_FREE": "false"}, "FT_DECODER_LAYERS=fused and FT_PADDING_FREE=false"),
        ({"FT_DECODER_LAYERS": "fused", "FT_SHARDING": "full"}, "FT_DECODER_LAYERS=fused and FT_SHARDING=full"),
        ({"FT_RESIDENT_WEIGHTS": "true", "FT_USE_4BIT": "false"}, "only to 4-bit weights"),
        ({"FT_PACKING": "true", "FT_PADDING_FREE": "false"}, "leave FT_PADDING_FREE at auto"),
        ({"FT_DECODER_LAYERS": "plain", "FT_MICRO_BATCH_TOKENS": "9"}, "FT_MICRO_BATCH_TOKENS works only with fused layers"),
        ({"FT_RECOMPUTED_LAYERS": "3", "FT_GRADIENT_CHECKPOINTING": "true"}, "set only one of them"),
    ],
)  # fmt: skip
def test_mutually_exclusive_ways_to_compute_are_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], told: str
) -> None:
    assert told in refusal(monkeypatch, **settings)


def test_settings_that_do_not_go_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(monkeypatch, FT_FP16="true", FT_BF16="true", FT_USE_NESTED_QUANT="true", FT_USE_4BIT="false")
    assert "FT_FP16 and FT_BF16 are both true" in message
    assert "it needs FT_USE_4BIT=true" in message


def test_a_fraction_of_another_dataset_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(monkeypatch, FT_EVAL_DATASET_NAME="user/data", FT_EVAL_SPLIT="0.05")
    assert "to one of its splits" in message


def test_three_mistakes_are_shown_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(monkeypatch, FT_LORA_RR="8", FT_LORA_R="x", FT_OPTIM="sgdd")
    assert message.startswith("3 settings are wrong:")
    assert all(name in message for name in ("FT_LORA_RR", "FT_LORA_R=", "FT_OPTIM"))


def test_an_extra_training_argument_that_exists_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, FT_EXTRA_TRAINING_ARGS='{"adam_beta1": 0.8, "dataloader_num_workers": 2}')
    assert settings.extra_training_args == {"adam_beta1": 0.8, "dataloader_num_workers": 2}


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, FT_LORA_R="", FT_EVAL_SPLIT="").lora_r == 64


def test_the_env_file_is_read_and_the_real_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    file = tmp_path / ".env"
    file.write_text("FT_LORA_R=8\nFT_LORA_ALPHA=32\n", encoding="utf-8")
    monkeypatch.setenv("FT_LORA_R", "16")
    monkeypatch.setenv("FT_LORA_ALPHA", "")  # so monkeypatch removes again what load_dotenv sets
    monkeypatch.delenv("FT_LORA_ALPHA")
    monkeypatch.setenv("FT_ENV_FILE", str(file))
    settings = load_settings()
    assert (settings.lora_r, settings.lora_alpha) == (16, 32)


def test_a_named_env_file_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "FT_ENV_FILE='nowhere.env': there is no such file" in refusal(monkeypatch, FT_ENV_FILE="nowhere.env")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("FT_LORA_ALPHA=3\nFT_LORA_R: 8\n", 2),
        ("\n# a comment\n\nFT_PACKING\n", 4),
        ("FT_LORA_ALPHA=3\n\nthis is no line\n", 3),
        ("export FT_LORA_ALPHA=3\nFT_NEW_MODEL='a\n", 2),
    ],
)
def test_a_line_of_the_file_that_cannot_be_read_is_named_and_never_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, line: int
) -> None:
    file = tmp_path / "my.env"
    file.write_text(text, encoding="utf-8")
    assert f"{file}, line {line}: not of the form NAME=value" in refusal(monkeypatch, FT_ENV_FILE=str(file))


def test_a_secret_in_the_wrong_variable_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(monkeypatch, HF_TOKEN="hf_canary_0123", FT_LORA_R="hf_canary_0123")
    assert "hf_canary_0123" not in message
    assert "***" in message


def test_blanks_around_a_key_are_dropped_and_a_character_that_no_key_has_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`echo key | base64` puts a line break into a Kubernetes Secret, and word processors typographic quotes around words."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE\n")
    load_settings()
    assert os.environ["AWS_ACCESS_KEY_ID"] == "AKIAEXAMPLE"
    for value in ("hf_t\u00e9st", "\u201chf_test\u201d", "hf_te\nst"):
        assert "HF_TOKEN holds a character that no key has" in refusal(monkeypatch, HF_TOKEN=value)


@pytest.mark.parametrize("variable", ["FT_STORE_URL", "FT_PUBLISH_TO", "FT_MODEL_NAME", "FT_DATASET_NAME"])
def test_keys_in_a_url_are_refused_and_not_repeated_even_with_the_slashes_that_aws_gives_them(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    message = refusal(monkeypatch, **{variable: "s3://AKIACANARY:wJal/canary+K7/x@bucket/runs"})
    assert "a URL must not hold keys" in message
    assert "canary" not in message.lower()


def test_masking_a_short_secret_does_not_leave_the_tail_of_a_longer_one() -> None:
    secrets = secret_values({"HF_TOKEN": "abcd", "WANDB_API_KEY": "abcdef"})
    assert masked("abcdef abcd", secrets) == "*** ***"


def test_the_fingerprint_of_training_ignores_what_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(monkeypatch)
    after = load(monkeypatch, FT_SAMPLE_PROMPTS='["Hello?"]', FT_LOG_FORMAT="json", FT_NEW_MODEL="other")
    assert before.fingerprint("train") == after.fingerprint("train")
    assert before.fingerprint("sample") != after.fingerprint("sample")
    assert load(monkeypatch, FT_LORA_R="8").fingerprint("train") != before.fingerprint("train")


@pytest.mark.parametrize("arguments", [["settings"], ["run"], ["plan"], ["--version"]])
def test_settings_and_their_errors_are_shown_without_importing_torch(arguments: list[str]) -> None:
    script = (
        "import sys, entrypoint\n"
        "try: entrypoint.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'boto3'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    environment = {
        "FT_LORA_RR": "8",
        "FT_OPTIM": "nonsense",
        "FT_EXTRA_TRAINING_ARGS": '{"nonsense": 1}',
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_run_started_by_a_version_without_a_setting_is_still_recognised(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(LORA_R="8")
    older = as_json(run.settings)
    del older["early_stopping_patience"]
    run.store.put(f"{run.id}/run.json", json.dumps({"created": "", "settings": older}).encode())
    Ledger(run).refuse_other_settings()
    newer = make_run(LORA_R="8", EVAL_SPLIT="0.2", EVAL_STEPS="1", EARLY_STOPPING_PATIENCE="3")
    with pytest.raises(SettingsError, match="FT_EARLY_STOPPING_PATIENCE: was None, is now 3"):
        Ledger(newer).refuse_other_settings()
    assert run.settings.fingerprint("train") != newer.settings.fingerprint("train")
