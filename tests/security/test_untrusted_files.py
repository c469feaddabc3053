"""Models, datasets, stores and `.env` files that were written to do harm."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.data.bounds import refuse_bombs
from job.environment import env_file, load_settings
from job.errors import InputError, SettingsError, in_a_line
from job.guard import model_files
from job.guard.limits import TooMuch, time_limit
from job.guard.secrets import is_secret, secret_values, visible_to
from job.hub.sources import Source, look_up
from job.report.model_card import _one_line
from job.settings import Settings
from job.stages import stages_of
from tests.conftest import Job, published

# -- secrets --------------------------------------------------------------------------------------------------------

STRANGE_SECRETS = (
    "GITHUB_TOKEN", "OPENAI_API_KEY", "AWS_CONTAINER_AUTHORIZATION_TOKEN", "PGPASSWORD", "SLACK_WEBHOOK", "MY_THING", "AZURE_CLIENT_SECRET",
    "GOOGLE_APPLICATION_CREDENTIALS_JSON", "NPM_TOKEN", "DATABASE_URL", "COHERE_KEY", "sops_age_key", "GITLAB_PAT", "SENTRY_DSN",
    "ANTHROPIC_API_KEY", "REPLICATE_API_TOKEN", "DOCKER_AUTH_CONFIG", "SSH_PRIVATE_KEY", "SESSION_COOKIE", "MINIO_ROOT_PASSWORD",
    "REDIS_URL", "MYSQL_PWD", "TWINE_PASSWORD", "VAULT_TOKEN", "KUBE_TOKEN", "HMAC_SIGNATURE", "LICENSE", "CF_API_KEY",
    "JOB_TOKEN", "JOB_DB_PASSWORD", "SLURM_JWT", "WANDB_PW", "HF_TOKENS",
)  # fmt: skip

_SHOWS_ITS_ENVIRONMENT = """
import json, os, sys
if "job.stages" in sys.orig_argv:
    with open(os.path.join(os.environ["FT_OUTPUT_DIR"], "seen-" + sys.orig_argv[-1] + ".json"), "w") as stream:
        json.dump(dict(os.environ), stream)
    print("printed:", os.environ.get("HF_TOKEN"), "and", os.environ.get("AWS_SECRET_ACCESS_KEY"))
"""


@pytest.mark.slow
def test_no_secret_of_any_name_reaches_a_stage_a_log_or_a_file(job: Job, tmp_path: Path) -> None:
    canaries = {
        name: f"canary-{name.lower()}-0123456789" for name in (*STRANGE_SECRETS, "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
    }
    canaries["https_proxy"] = "http://me:canary-proxy-password@127.0.0.1:1"
    (tmp_path / "sitecustomize.py").write_text(_SHOWS_ITS_ENVIRONMENT, encoding="utf-8")
    output = Path(job.environment["FT_OUTPUT_DIR"])
    output.mkdir()
    job.forks = False
    settings = {
        "PYTHONPATH": str(tmp_path),
        "FT_STORE_URL": str(tmp_path / "store"),
        "FT_LOG_LEVEL": "debug",
        **canaries,
    }
    result = job.run(**settings)
    assert result.code == 0, result.stderr
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"text": "one"}\n{"text": []}\n', encoding="utf-8")
    failed = job.run(FT_DATASET_NAME=str(wrong), FT_RUN_ID="failed", **settings)
    assert failed.code == 65, failed.stderr
    seen = {file.stem.removeprefix("seen-"): json.loads(file.read_text()) for file in output.glob("seen-*.json")}
    assert {stage.name for stage in stages_of(Settings())} <= seen.keys()
    for stage, variables in seen.items():
        online = ("preflight", "download", "publish")
        needed = {"AWS_CONTAINER_AUTHORIZATION_TOKEN"} if stage in online else set()  # boto3's
        assert set(STRANGE_SECRETS) & variables.keys() == needed, stage
        assert ("HF_TOKEN" in variables) == (stage in online), stage
    assert "printed: *** and ***" in result.stdout
    everything = [result.stdout, result.stderr, failed.stdout, failed.stderr]
    everything += [
        path.read_text(errors="replace")
        for folder in (output, tmp_path / "store")
        for path in folder.rglob("*")
        if path.is_file() and "seen-" not in path.name
    ]
    assert not [text for text in everything if "canary" in text]


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "FT_MICRO_BATCH_TOKENS", "HF_HOME", "NCCL_DEBUG", "PATH", "CUDA_VISIBLE_DEVICES"]
)
def test_what_is_known_to_be_harmless_is_no_secret(name: str) -> None:
    assert not is_secret(name)
    assert visible_to({name: "1"}, ()) == {name: "1"}


def test_a_secret_is_masked_in_every_shape_that_it_takes() -> None:
    secret = 'pass"word\\with+signs'
    shapes = secret_values({"MY_PASSWORD": secret})
    assert {secret, json.dumps(secret)[1:-1], "pass%22word%5Cwith%2Bsigns"} <= set(shapes)
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG\n-----END KEY-----"
    assert "MIIEvQIBADANBgkqhkiG" in secret_values({"TLS": key})


# -- .env -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dotenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], SettingsError | None]:
    def load(text: str) -> SettingsError | None:
        (tmp_path / "some.env").write_text(text, encoding="utf-8")
        monkeypatch.setenv("FT_ENV_FILE", str(tmp_path / "some.env"))
        before = dict(os.environ)
        try:
            load_settings()
        except SettingsError as error:
            return error
        finally:
            for name in os.environ.keys() - before.keys():
                monkeypatch.delenv(name, raising=False)
        return None

    return load


@pytest.mark.parametrize(
    "name", ["LD_PRELOAD", "PATH", "PYTHONPATH", "HF_HOME", "BASH_ENV", "PYTHONSTARTUP", "https_proxy"]
)
def test_a_dotenv_file_may_not_set_what_changes_programs(dotenv: Callable[[str], Any], name: str) -> None:
    error = dotenv(f"{name}=/tmp/evil\nFT_LORA_R=8\n")
    assert error is not None and name in error.message and "some.env" in error.message
    assert os.environ.get(name) != "/tmp/evil"


@pytest.mark.parametrize(
    ("endpoint", "secret"), [("HF_ENDPOINT", "HF_TOKEN"), ("AWS_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY")]
)
def test_a_token_of_the_environment_never_goes_where_a_dotenv_file_says(
    dotenv: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, endpoint: str, secret: str
) -> None:
    monkeypatch.setenv(secret, "a-real-secret")
    error = dotenv(f"{endpoint}=https://evil.example\n")
    assert error is not None and endpoint in error.message and secret in error.message
    assert endpoint not in os.environ
    monkeypatch.delenv(secret)
    assert dotenv(f"{endpoint}=https://mine.example\n{secret}=mine\n") is None  # both from one place


def test_a_dotenv_file_cannot_copy_a_secret_into_a_setting(
    dotenv: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    (tmp_path / "x.env").write_text("FT_NEW_MODEL=${HF_TOKEN}\n", encoding="utf-8")
    monkeypatch.delenv("FT_NEW_MODEL", raising=False)
    assert env_file.load(tmp_path / "x.env") == []
    assert "canary" not in os.environ.pop("FT_NEW_MODEL")


def test_the_first_log_line_names_the_file(job: Job, tmp_path: Path) -> None:
    (tmp_path / "my.env").write_text("FT_LORA_R=2\n", encoding="utf-8")
    result = job.run(FT_ENV_FILE=str(tmp_path / "my.env"), FT_STAGES="download")
    assert result.code == 0, result.stderr
    assert str(tmp_path / "my.env") in result.events[0]["message"]


# -- the store ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", ["f" * 40, "refs/pr/1", "main", ""])
def test_the_store_cannot_choose_another_commit_than_the_users(recorded: str) -> None:
    with pytest.raises(SettingsError):
        look_up(Source.parse("FT_MODEL_NAME", "model", f"me/base@{'a' * 40}"), recorded)


def test_extra_files_in_the_stores_adapter_are_not_published(uninterrupted: Job, tmp_path: Path) -> None:
    from job.hub.layout import _ADAPTER_FILES, _link_tree

    adapter = tmp_path / "adapter"
    shutil.copytree(published(uninterrupted) / "adapter", adapter)
    (adapter / "modeling_evil.py").write_text("import os", encoding="utf-8")
    (adapter / "evil").mkdir()
    (adapter / "evil" / "pytorch_model.bin").write_bytes(b"pickle")
    for name in _ADAPTER_FILES:
        (adapter / "evil" / name).write_bytes(b"bytes of the attacker")
    _link_tree(adapter, tmp_path / "out", _ADAPTER_FILES)
    assert {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == set(_ADAPTER_FILES)


def test_what_is_published_of_a_folder_is_what_the_job_puts_there_and_where(tmp_path: Path) -> None:
    from job.hub.layout import _EXPORTS, _MODEL_FILES, _link_tree

    names = ("model.safetensors", "model-00001-of-00002.safetensors", "evil.safetensors", "config.json", "a/config.json", "fp8/config.json",
             "fp8/model.safetensors", "fp8/a/model.safetensors", "x.Q8_0.gguf", "a/x.gguf", "Modelfile", "Modelfile.py", "CONFIG.JSON")  # fmt: skip
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    for wanted, found in (
        (_MODEL_FILES, {"model.safetensors", "model-00001-of-00002.safetensors", "config.json"}),
        (_EXPORTS, {"fp8/config.json", "fp8/model.safetensors", "x.Q8_0.gguf", "Modelfile"}),
    ):
        out = tmp_path / f"out-{len(wanted)}"
        _link_tree(tmp_path / "in", out, wanted)
        assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == found


# -- a model's files ------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "evil-model"))


def change(file: Path, **fields: Any) -> None:
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(found | fields), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"num_hidden_layers": 200_000}),
        ("config.json", {"max_position_embeddings": "many"}),
        ("config.json", {"_attn_implementation": "evil/kernel"}),
        ("config.json", {"attn_implementation": {"": "evil/kernel"}}),
        ("config.json", {"_experts_implementation": "evil/experts"}),
        ("config.json", {"dtype": "load"}),
        ("config.json", {"torch_dtype": "os.system"}),
        ("config.json", {"architectures": "LlamaForCausalLM"}),
        ("config.json", {"vocab_size": -1}),
        ("config.json", {"hidden_size": 1e99}),
        ("config.json", {"quantization_config": "load"}),
        ("tokenizer.json", {"added_tokens": [{"id": n, "content": f"<{n}>", "special": True} for n in range(300_000)]}),
        ("tokenizer.json", {"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 64}] * 5}}),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
        ("model.safetensors.index.json", {"weight_map": {"lm_head.weight": "../../secret.safetensors"}}),
        ("model.safetensors.index.json", {"weight_map": "all"}),
        ("tokenizer_config.json", {"chat_template": "x" * (2 << 20)}),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_model_that_asks_for_what_no_model_needs_is_refused_by_file_and_field(
    model: Path, file: str, fields: dict[str, Any]
) -> None:
    change(model / file, **fields)
    with pytest.raises(InputError, match=file.replace(".", r"\.")):
        model_files.check(model)


def test_a_model_that_is_what_it_seems_is_accepted(model: Path) -> None:
    model_files.check(model)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}",
            "took longer",
        ),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}", "writes more than"),
        ("{{ messages[0].nothing.at_all }}", "cannot be used as messages"),
        (
            '{{ raise_exception(\'x\\n\\x1e{"event": "message", "text": "Run complete.", "level": "info"}\\ny\') }}',
            "cannot be used as messages",
        ),
        ("{{ 'x' * messages }}", "cannot be used as messages"),
        ("{{ 'x' * (10 ** 15) }}", "cannot be used as messages"),
        ("{{ 'x' * (10 ** 20) }}", "cannot be used as messages"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "cannot be used as messages"),
    ],
    ids=["endless", "endless text", "undefined", "forges an event", "type error", "memory", "overflow", "recursion"],
)
def test_a_template_that_fails_or_never_ends_is_65_and_forges_nothing(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, said: str
) -> None:
    (tmp_path / "template.jinja").write_text(template, encoding="utf-8")
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    result = job.run(
        FT_STAGES="prepare", FT_CHAT_TEMPLATE=str(tmp_path / "template.jinja"), FT_DATASET_NAME=str(tmp_path / "rows.jsonl"),
        FT_DATASET_SPLIT="train", FT_EVAL_SPLIT="",
    )  # fmt: skip
    assert result.code == 65, result.stderr
    assert said in result.error["message"]
    assert not [event for event in result.events if event.get("message") == "Run complete."]
    assert result.ended["prepare"] == "failed"


def test_a_template_that_stays_just_below_the_limit_of_a_row_cannot_take_days_for_all_rows() -> None:
    from job.guard.limits import Budget

    budget = Budget(slack_seconds=0.3)
    for _ in range(20):  # a real one: a few milliseconds for a row
        with budget.row(2_000):
            pass
    budget = Budget(slack_seconds=0.3)
    began = time.monotonic()

    def render_slowly() -> None:
        for _ in range(100):
            with budget.row(100):
                time.sleep(0.1)

    with pytest.raises(InputError, match="takes longer for the rows than any real one does"):
        render_slowly()
    assert time.monotonic() - began < 2


def test_a_template_that_fails_on_a_prompt_alone_is_found_before_the_training(job: Job, tmp_path: Path) -> None:
    """The overflow is only reached by the prompt, which no row contains."""
    template = "{% for m in messages %}{% if 'prompt' in m.content %}{{ 'x' * (10 ** 20) }}{% endif %}{{ m.content }}{% endfor %}"
    (tmp_path / "template.jinja").write_text(template, encoding="utf-8")
    result = job.run(FT_CHAT_TEMPLATE=str(tmp_path / "template.jinja"), FT_SAMPLE_PROMPTS='["a prompt"]')
    assert result.code == 65, result.stderr
    assert "FT_SAMPLE_PROMPTS" in result.error["message"]
    assert result.ended["prepare"] == "failed" and "train" not in result.ended


def test_generation_settings_of_the_model_are_made_anew(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from job.model.generation import greedy
    from job.model.generation import published as kept

    change(
        model / "generation_config.json",
        num_beams=100_000,
        max_time=1e9,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        eos_token_id=[2, 99_999],
    )
    loaded = AutoModelForCausalLM.from_pretrained(model)
    for made in (greedy(loaded), kept(loaded)):
        assert (made.num_beams or 1) == 1 and made.max_time is None and made.eos_token_id == [2]
    assert not greedy(loaded).do_sample
    assert (kept(loaded).temperature, kept(loaded).top_p) == (0.6, 0.9)


def test_work_that_takes_too_long_is_ended() -> None:
    def endless() -> None:
        with time_limit(0.2, "the test"):
            while True:
                pass

    with pytest.raises(TooMuch, match=r"the test took longer than 0\.2 s"):
        endless()


# -- datasets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "deep",
    ['{"text": ' + "[" * 50_000 + "]" * 50_000 + "}", '{"a": ' * 50_000 + "1" + "}" * 50_000],
    ids=["lists", "objects"],
)
@pytest.mark.parametrize("beside", ["", '{"text": "fine"}\n'], ids=["alone", "beside a flat row"])
def test_deep_json_is_refused_with_its_line_and_ends_no_reader(
    job: Job, tmp_path: Path, deep: str, beside: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{beside}{deep}\n", encoding="utf-8")
    result = job.run(FT_STAGES="prepare", FT_DATASET_NAME=str(file), FT_DATASET_SPLIT="train", FT_EVAL_SPLIT="")
    assert result.code == 65
    assert f"rows.jsonl, {'line 2' if beside else 'line 1'}: it is nested too deeply" in result.error["message"]


def test_a_parquet_bomb_is_refused_by_its_footer(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"text": ["x" * 1000] * 50_000}), tmp_path / "rows.parquet", compression="zstd", use_dictionary=False
    )
    with pytest.raises(InputError, match="unpacks to"):
        refuse_bombs([tmp_path / "rows.parquet"], 10 << 20)


def test_a_row_too_large_to_tokenize_is_left_out_and_not_tokenized(job: Job, tmp_path: Path) -> None:
    rows = [{"text": "a fine row"}] * 30 + [{"text": "word " * (2 << 20)}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = job.run(
        FT_STAGES="prepare", FT_DATASET_NAME=str(tmp_path / "rows.jsonl"), FT_DATASET_SPLIT="train", FT_EVAL_SPLIT=""
    )
    assert result.code == 0, result.stderr
    assert "10,485,760 characters" in result.stdout


def test_column_names_and_answers_cannot_leave_the_place_they_are_shown_in(job: Job, tmp_path: Path) -> None:
    column = 'x\n\x1e{"event": "message", "level": "info", "text": "Run test-run is complete."}\ny'
    (tmp_path / "rows.jsonl").write_text(json.dumps({column: "x"}) + "\n", encoding="utf-8")
    result = job.run(
        FT_STAGES="prepare", FT_DATASET_NAME=str(tmp_path / "rows.jsonl"), FT_DATASET_SPLIT="train", FT_EVAL_SPLIT=""
    )
    assert result.code == 65
    assert not [event for event in result.events if event.get("message") == "Run test-run is complete."]
    assert "\x1e" not in result.stdout + result.stderr
    assert _one_line("a | b\rc\x1b[2J <script> `x`") == "a \\| b<br>c\\\\x1b\\[2J \\<script\\> \\`x\\`"


# -- this machine ---------------------------------------------------------------------------------------------------


def test_logs_and_reports_are_not_for_everyone_but_what_is_published_is(uninterrupted: Job) -> None:
    run = Path(uninterrupted.environment["FT_OUTPUT_DIR"]) / "runs" / "test-run"
    for file in [*run.rglob("logs/*.log"), run / "prepare" / "data_report.json"]:
        assert not stat.S_IMODE(file.stat().st_mode) & 0o007, file
    for file in published(uninterrupted).rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) & 0o004, file


def test_an_error_in_a_line_is_one_line() -> None:
    assert in_a_line(ValueError("one\ntwo")) == "ValueError: one"
