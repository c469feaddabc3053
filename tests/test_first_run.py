"""First-run manners: what a newcomer sees of the job, and what each mistake says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.environment import load_settings
from job.errors import InputError, SettingsError, TransientError
from job.report.plots import draw_loss_curve
from job.settings import Settings
from tests.conftest import ROOT, Job, Result, finished, published

Environment = Callable[..., None]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    def put(**settings: str) -> None:
        for name, value in settings.items():
            monkeypatch.setenv(name, value)

    return put


def command(*words: str, **variables: str) -> Result:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "entrypoint.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "FT_ENV_FILE": "/dev/null", **variables},
    )  # fmt: skip
    return finished(process, *process.communicate(timeout=60))


# -- mistakes, before any process is started ------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_rows_is_refused_with_65_before_a_stage_starts(job: Job, tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content, encoding="utf-8")
    result = job.run(FT_DATASET_NAME=str(tmp_path / "rows.jsonl"))
    assert result.code == 65
    assert "has no rows" in result.error["message"] and "FT_DATASET_NAME" in result.error["message"]
    assert result.events == []


def test_missing_paths_and_wrong_values_are_all_reported_at_once(environment: Environment) -> None:
    environment(FT_MODEL_NAME="/no/model", FT_DATASET_NAME="./no.jsonl", FT_EVAL_DATASET_NAME="~/no.csv", FT_LORA_R="0")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    for name in ("FT_MODEL_NAME", "FT_DATASET_NAME", "FT_EVAL_DATASET_NAME", "FT_LORA_R"):
        assert name in caught.value.message


def test_a_file_that_may_not_be_read_is_a_wrong_setting(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root, who reads everything
    environment(FT_DATASET_NAME=str(tmp_path / "rows.jsonl"))
    with pytest.raises(SettingsError, match="may not read it"):
        load_settings()


@pytest.mark.parametrize("config", ["{not json", "[1, 2]", "[" * 20_000])
def test_a_model_whose_config_cannot_be_read_is_refused_with_65(
    environment: Environment, tmp_path: Path, config: str
) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    environment(FT_MODEL_NAME=str(tmp_path))
    with pytest.raises(InputError, match=r"config\.json"):
        load_settings()


def assert_refused(environment: Environment, variables: dict[str, str], said: str) -> None:
    environment(**variables)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"FT_OPTIM": "adamw"}, "Did you mean adamw_torch?"),
        ({"FT_OPTIM": "lion"}, "Did you mean lion_8bit?"),
        ({"FT_OPTIM": "grokadamw"}, "needs the package grokadamw"),
        ({"FT_OPTIM": "galore_adamw_8bit"}, "needs the package galore_torch"),
        ({"FT_LR_SCHEDULER_TYPE": "cosine_with_min_lr"}, "needs min_lr or min_lr_rate"),
        ({"FT_LR_SCHEDULER_TYPE": "warmup_stable_decay"}, "needs num_decay_steps"),
        ({"FT_LR_SCHEDULER_TYPE": "reduce_lr_on_plateau"}, "set FT_EVAL_STEPS"),
        ({"FT_EXTRA_TRAINING_ARGS": '{"adam_beta1": 2}'}, "'adam_beta1' is 2: must be at least 0 and less than 1"),
        ({"FT_EXTRA_TRAINING_ARGS": '{"dataloader_num_workers": "two"}'}, "'dataloader_num_workers' is 'two'"),
        ({"FT_EXTRA_TRAINING_ARGS": '{"dataloader_drop_last": "yes"}'}, "must be bool"),
        ({"FT_EXTRA_TRAINING_ARGS": '{"adam_epsilon": -1}'}, "'adam_epsilon' is -1"),
    ],
)
def test_what_would_only_fail_in_training_fails_in_the_settings(
    environment: Environment, variables: dict[str, str], said: str
) -> None:
    assert_refused(environment, variables, said)


def test_a_schedule_with_what_it_needs_is_accepted(environment: Environment) -> None:
    extra = {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "adam_beta2": 0.95, "neftune_noise_alpha": 5}
    environment(FT_LR_SCHEDULER_TYPE="cosine_with_min_lr", FT_EXTRA_TRAINING_ARGS=json.dumps(extra))
    assert load_settings().extra_training_args == extra


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"FT_STORE_URL": "s3:/bucket/prefix"}, "with two slashes"),
        ({"FT_STORE_URL": "s3:bucket"}, "with two slashes"),
        ({"FT_STORE_URL": "s3//bucket"}, "write s3://… with two slashes"),
        ({"FT_PUBLISH_TO": "hf//me/model"}, "write hf://… with two slashes"),
        ({"FT_PUBLISH_TO": "s3://bucket"}, "names no prefix"),
        (
            {"FT_PUBLISH_TO": "https://huggingface.co/me/model"},
            "must be hf://user/name, s3://bucket/prefix or a folder",
        ),
        ({"FT_PUBLISH_TO": "me/model"}, "hf://me/model for the Hub"),
    ],
)
def test_a_near_miss_of_a_url_does_not_become_a_folder(
    environment: Environment, variables: dict[str, str], said: str
) -> None:
    assert_refused(environment, variables, said)


def test_a_store_below_the_home_folder_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from job.storage import open_store

    monkeypatch.setenv("HOME", str(tmp_path))
    open_store("~/store").put("key", b"value")
    assert (tmp_path / "store" / "key").read_bytes() == b"value"


def test_choices_may_be_written_in_any_case(environment: Environment) -> None:
    environment(FT_DEVICE="CPU", FT_LOG_LEVEL="Debug", FT_STAGES="Train,SAMPLE", FT_PACKING="True", FT_BF16="AUTO")
    settings = load_settings()
    assert (settings.device, settings.log_level, settings.stages) == ("cpu", "debug", ("train", "sample"))
    assert (settings.packing, settings.bf16) == (True, "auto")


# -- the command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "hint"),
    [("trian", "FT_STAGES=train"), ("statsu", "`status`"), ("plna", "`plan`"), ("--verbose", "The commands are")],
)
def test_a_mistyped_command_ends_with_78_and_the_nearest_one(word: str, hint: str) -> None:
    result = command(word)
    assert result.code == 78
    assert word in result.error["message"] and hint in result.error["hint"]


@pytest.mark.parametrize(
    ("environment", "is_text"),
    [({}, False), ({"SLURM_JOB_ID": "7"}, True), ({"FT_LOG_FORMAT": "TEXT"}, True), ({"FT_LOG_FORMAT": "json"}, False)],
)
def test_the_last_error_is_text_where_the_log_is(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], is_text: bool
) -> None:
    for name in ("SLURM_JOB_ID", "FT_LOG_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ended = subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py"), "trian"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 78
    assert ended.stderr.startswith("error: 'trian'" if is_text else "{"), ended.stderr


def test_the_steps_are_not_told_when_settings_choose_among_the_rows(
    make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from job.commands.plan import print_plan

    print_plan(make_run())
    assert "240 rows" in capsys.readouterr().out
    for name, value in {"DATASET_SPLIT": "train[:24]", "DATASET_SAMPLE": "50", "DEDUPLICATE": "true"}.items():
        print_plan(make_run(**{name: value}))
        monkeypatch.delenv(f"FT_{name}")
        told = capsys.readouterr().out
        assert "240 rows" not in told and "known once the data is prepared" in told, name


def test_help_says_what_each_command_does() -> None:
    text = command("--help").stdout
    for name in ("run", "plan", "status", "settings"):
        assert re.search(rf"^  {name} +\w{{3,}}", text, re.MULTILINE), name


def test_a_reader_that_closes_the_pipe_is_not_an_error() -> None:
    shell = f"{sys.executable} entrypoint.py settings | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_plan_ends_with_the_code_that_a_run_would_end_with(job: Job) -> None:
    result = job.run("plan", FT_MODEL_NAME="somebody/nothing-like-this")
    assert result.code == job.run(FT_MODEL_NAME="somebody/nothing-like-this").code == 78
    assert "steps" in result.stdout  # the rest of the plan is shown all the same


# -- names and figures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "dataset", "name"),
    [
        ("NousResearch/Llama-2-7b-chat-hf", "mlabonne/guanaco-llama2-1k", "Llama-2-7b-chat-hf-guanaco-llama2-1k"),
        ("me/base@v1.0", "/data/my rows.jsonl.gz", "base-my-rows"),
        ("s3://bucket/models/base/", "./rows.PARQUET", "base-rows"),
        ("../..", "/", "model"),
    ],
)
def test_the_models_name_is_derived_from_model_and_dataset(model: str, dataset: str, name: str) -> None:
    assert Settings(model_name=model, dataset_name=dataset).new_model_name == name
    assert Settings(model_name=model, dataset_name=dataset, new_model="mine").new_model_name == "mine"


def test_a_short_run_logs_its_first_and_last_step_and_reports_the_last_one(job: Job) -> None:
    result = job.run(FT_STAGES="train", FT_MAX_STEPS="3", FT_LOGGING_STEPS="5", FT_EVAL_SPLIT="")
    assert result.code == 0, result.stderr
    progress = [event for event in result.events if event.get("event") == "progress" and event["stage"] == "train"]
    assert (progress[-1]["done"], progress[-1]["total"]) == (3, 3)
    state = Path(job.environment["FT_OUTPUT_DIR"]) / "runs/test-run/train/trainer_state.json"
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 3]
    figures = next(stage["figures"] for stage in result.events[-1]["stages"] if stage["stage"] == "train")
    assert figures["loss_last"] == pytest.approx(history[-2]["loss"])


@pytest.mark.xdist_group("uninterrupted")
def test_a_complete_run_says_where_its_model_is_also_on_a_new_machine(uninterrupted: Job, tmp_path: Path) -> None:
    where = str(published(uninterrupted))
    assert where in uninterrupted.run().events[-1]["message"]
    store = Path(uninterrupted.environment["FT_OUTPUT_DIR"]) / "store"
    elsewhere = uninterrupted.run(FT_OUTPUT_DIR=str(tmp_path / "new"), FT_STORE_URL=str(store), FT_STAGES="publish")
    assert where in elsewhere.events[-1]["message"]


def test_a_failed_run_ends_its_log_with_exit_code_and_reason(job: Job) -> None:
    result = job.run(FT_DEVICE="cuda", FT_STAGES="train")
    assert result.events[-1]["event"] == "run_ended"
    assert result.events[-1]["exit_code"] == result.code == 69
    assert "no GPU" in result.events[-1]["reason"]


def test_a_piped_table_is_not_folded_and_keeps_its_paths_whole(job: Job, tmp_path: Path) -> None:
    deep = tmp_path / ("a-folder-with-a-long-name-" * 4)
    result = job.run(FT_LOG_FORMAT="text", FT_STAGES="train", FT_MAX_STEPS="1", FT_OUTPUT_DIR=str(deep), COLUMNS="80")
    assert result.code == 0, result.stderr
    assert f"adapter: {deep}/runs/test-run/train/adapter\n" in result.stdout


def test_evaluations_are_points_in_the_plot_and_not_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, Any] = {}
    plot = Axes.plot

    def recorded(self: Any, x: Any, y: Any, style: str, **named: Any) -> Any:
        drawn[named["label"].split()[0]] = style
        return plot(self, x, y, style, **named)

    monkeypatch.setattr(Axes, "plot", recorded)
    history = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 0, "eval_loss": 3.0},
        {"step": 2, "eval_loss": 1.0},
    ]
    draw_loss_curve(history, "title", tmp_path / "curve.png")
    assert drawn == {"training": "-", "evaluation": "o"}


def test_an_upload_that_fails_for_long_is_reported_within_half_a_minute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from types import SimpleNamespace

    from job.checkpoints import syncer

    assert syncer._SLOW_SECONDS <= 30
    monkeypatch.setattr(syncer, "_SLOW_SECONDS", 0.1)
    over, told = threading.Event(), []
    monkeypatch.setattr(syncer, "commit", lambda *_, **__: over.wait(10))
    store = SimpleNamespace(trouble=lambda since: "S3 answers 503 SlowDown")
    run = SimpleNamespace(id="a", store=store, fingerprint=lambda stage: "f")
    lease = SimpleNamespace(record=SimpleNamespace(attempt=1), renew=None)
    monkeypatch.setattr(syncer, "apply_retention", lambda *_: [])
    failed: list[str] = []
    restored: Any = SimpleNamespace(rejected=frozenset())
    uploads = syncer.Syncer(run, lease, restored, lambda *_: None, failed.append, on_slow=told.append)  # type: ignore[arg-type]
    uploads.offer(7, tmp_path)
    deadline = time.monotonic() + 5
    while not told and time.monotonic() < deadline:
        time.sleep(0.02)
    over.set()
    uploads.close()
    assert "step 7 is not stored yet" in told[0] and "S3 answers 503 SlowDown" in told[0]
    assert not failed, "it is only slow"


def test_a_store_that_answers_503_says_so_while_it_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from job.storage import open_store

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "a",
                        "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    store, began = open_store("s3://bucket/prefix"), time.monotonic()
    assert store.trouble(began) is None
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(TransientError):
        store.get("key")
    server.shutdown()
    assert "503" in str(store.trouble(began))
    assert store.trouble(time.monotonic()) is None


def test_settings_import_no_library_of_the_stages(tmp_path: Path) -> None:
    """A mistake is answered before anything heavy is imported."""
    shutil.copy(ROOT / "examples" / "lighthouse.jsonl", tmp_path / "rows.jsonl")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from job.environment import load_settings; load_settings(); " \
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'huggingface_hub'} & sys.modules.keys()))"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "FT_DATASET_NAME": str(tmp_path / "rows.jsonl"), "FT_OPTIM": "adamw_torch", "FT_ENV_FILE": "/dev/null",
             "FT_EXTRA_TRAINING_ARGS": '{"adam_beta1": 0.8}'},
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr
