"""What a monitoring system and a liveness probe see."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from job import __version__
from job.report.metrics import Metrics
from tests.conftest import Job, free_port


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def answer(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def value(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)}(?:_total)? (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not in\n{text}"
    return float(found[1])


def step(done: int, **figures: float) -> dict[str, object]:
    return {"event": "progress", "done": done, "total": 100, "unit": "steps", **figures}


def test_the_metrics_of_a_training_can_be_scraped() -> None:
    clock, port = Clock(), free_port()
    metrics = Metrics("a-run", 60, clock)
    metrics.serve("127.0.0.1", port)
    metrics.attempt(3)
    metrics.stage("train")
    metrics.working(True)
    metrics.progress("train", step(7, loss=1.5, learning_rate=1e-4, tokens_per_second=3000.0, mfu=0.4))
    metrics.checkpoint_offered()
    clock.now += 4
    status, text = answer(port, "/metrics")
    assert status == 200
    assert value(text, "finetune_upload_lag_seconds") == 4
    metrics.checkpoint_committed(4.5)
    clock.now += 10
    text = answer(port, "/metrics")[1]
    expected = {
        "finetune_step": 7, "finetune_steps": 100, "finetune_loss": 1.5, "finetune_learning_rate": 1e-4, "finetune_tokens_per_second": 3000,
        "finetune_mfu_ratio": 0.4, "finetune_checkpoint_age_seconds": 10, "finetune_upload_lag_seconds": 4.5, "finetune_restarts": 2,
        'finetune_stage{finetune_stage="train"}': 1, 'finetune_stage{finetune_stage="merge"}': 0, 'finetune_run_info{run_id="a-run"}': 1,
    }  # fmt: skip
    assert {name: value(text, name) for name in expected} == expected


def test_a_series_begins_with_its_first_value_and_the_checkpoint_s_age_with_the_training() -> None:
    clock, port = Clock(), free_port()
    metrics = Metrics("a-run", 60, clock)
    metrics.serve("127.0.0.1", port)
    text = answer(port, "/metrics")[1]
    for name in (
        "loss",
        "eval_loss",
        "gradient_norm",
        "step",
        "steps",
        "remaining_seconds",
        "checkpoint_age_seconds",
        "upload_lag_seconds",
    ):
        assert f"finetune_{name}" not in text, name
    assert value(text, f'finetune_build_info{{version="{__version__}"}}') == 1
    metrics.stage("train")
    metrics.working(True)
    clock.now += 30
    metrics.progress("train", step(10, loss=2.0))
    text = answer(port, "/metrics")[1]
    assert value(text, "finetune_checkpoint_age_seconds") == 30
    assert "finetune_remaining_seconds" not in text and "finetune_eval_loss" not in text
    clock.now += 20
    metrics.progress("train", step(14, loss=1.9, eval_loss=2.5, grad_norm=0.7))
    text = answer(port, "/metrics")[1]
    assert value(text, "finetune_remaining_seconds") == 86 * 20 / 4
    assert (value(text, "finetune_eval_loss"), value(text, "finetune_gradient_norm")) == (2.5, 0.7)


def test_a_node_that_stores_nothing_has_no_age_of_its_checkpoints() -> None:
    """It grows there without end, and an alert fires after an hour."""
    clock, port = Clock(), free_port()
    metrics = Metrics("a-run", 60, clock, stores=False)
    metrics.serve("127.0.0.1", port)
    metrics.stage("train")
    metrics.working(True)
    clock.now += 7200
    metrics.progress("train", step(10, loss=2.0))
    text = answer(port, "/metrics")[1]
    assert value(text, "finetune_loss") == 2.0
    assert not re.search(r"finetune_(checkpoint_age|upload_lag|failed_uploads|restarts)", text), text


def test_gpu_seconds_count_steps_as_training_and_everything_else_as_waiting_and_never_fall() -> None:
    clock, port = Clock(), free_port()
    metrics = Metrics("a-run", 60, clock, gpus=4)
    metrics.serve("127.0.0.1", port)

    def seen() -> tuple[float, float]:
        text = answer(port, "/metrics")[1]
        training, waiting = (
            re.search(rf'^finetune_gpu_seconds_total{{use="{use}"}} (\S+)$', text, re.MULTILINE)
            for use in ("training", "waiting")
        )
        assert training and waiting, text
        return float(training[1]), float(waiting[1])

    metrics.stage("prepare")
    clock.now += 10
    assert seen() == (0, 40)
    metrics.stage("train")
    clock.now += 5
    metrics.progress("train", step(30))  # resumed: the steps before it were another start's
    clock.now += 7
    assert seen() == (0, 60)
    metrics.progress("train", step(30, evaluated=2))
    metrics.progress("train", step(31))
    assert seen() == (28, 60)
    clock.now += 2
    metrics.stage(None)
    assert seen() == (28, 68)
    clock.now += 1
    assert seen() == (28, 72)


def test_the_seconds_of_a_save_are_no_training_and_what_the_last_start_lost_is_told_once() -> None:
    clock, port = Clock(), free_port()
    metrics = Metrics("a-run", 60, clock, gpus=2)
    metrics.serve("127.0.0.1", port)
    metrics.stage("train")
    metrics.lost(8)
    metrics.progress("train", step(10))
    clock.now += 10  # four steps, of which the first two are told before the save
    metrics.progress("train", step(12))
    clock.now += 13
    metrics.checkpoint_offered(save_seconds=3)
    clock.now += 5
    metrics.progress("train", step(15))
    metrics.lost(8)  # training was started again in a smaller plan
    text = answer(port, "/metrics")[1]
    seen = {
        use: float(seconds)
        for use, seconds in re.findall(r'^finetune_gpu_seconds_total{use="(\w+)"} (\S+)$', text, re.M)
    }
    assert seen == {"training": 2 * 25, "saving": 2 * 3, "waiting": 0, "lost": 2 * 8}


def test_unsaved_seconds_reach_from_the_last_stored_checkpoint_to_the_last_step() -> None:
    clock = Clock()
    metrics = Metrics("a-run", 60, clock)
    assert metrics.unsaved_seconds() == 0
    metrics.stage("train")
    clock.now += 100  # loading the model
    metrics.progress("train", step(10))
    clock.now += 20
    metrics.progress("train", step(14))
    assert metrics.unsaved_seconds() == 20
    metrics.checkpoint_offered()
    clock.now += 7
    metrics.progress("train", step(15))
    assert metrics.unsaved_seconds() == 27  # it is not stored yet
    metrics.checkpoint_committed(6)
    clock.now += 1000
    assert metrics.unsaved_seconds() == 7
    metrics.stage(None)  # the stage failed
    assert metrics.unsaved_seconds() == 7


def test_without_gpus_no_gpu_seconds_are_told_and_every_failed_upload_counts() -> None:
    port = free_port()
    metrics = Metrics("a-run", 60)
    metrics.serve("127.0.0.1", port)
    metrics.upload_failed()
    metrics.upload_failed()
    text = answer(port, "/metrics")[1]
    assert "gpu_seconds" not in text
    assert value(text, "finetune_failed_uploads") == 2


def test_the_probe_fails_when_a_stage_stalls_and_only_then() -> None:
    clock, port = Clock(), free_port()
    metrics = Metrics("a-run", 60, clock)
    metrics.serve("127.0.0.1", port)
    clock.now += 1000
    assert answer(port, "/healthz")[0] == 200  # no stage is at work
    metrics.working(True)
    metrics.progress("train", step(1))
    clock.now += 59
    metrics.progress("train", step(1))  # the same step again is not progress
    clock.now += 2
    assert answer(port, "/healthz")[0] == 503
    metrics.progress("train", step(1, evaluated=5))  # an evaluation is progress too
    assert answer(port, "/healthz")[0] == 200
    metrics.progress("download", step(1))
    clock.now += 61
    assert answer(port, "/healthz")[0] == 503
    metrics.moved()
    assert answer(port, "/healthz")[0] == 200
    clock.now += 61
    metrics.working(False)
    assert answer(port, "/healthz")[0] == 200


def scraped_until(process: subprocess.Popen[str], port: int, *names: str) -> str:
    """The metrics of a running job once they have a value for all of `names`."""
    deadline, seen = time.monotonic() + 120, ""
    while not all(f"finetune_{name} " in seen for name in names):
        assert time.monotonic() < deadline and process.poll() is None, seen
        try:
            seen = answer(port, "/metrics")[1]
        except OSError:
            time.sleep(0.1)
    return seen


def read_aside(process: subprocess.Popen[str]) -> Future[str]:
    """The job's whole log, once it has ended. A full pipe would stop the job."""
    assert process.stdout is not None
    return ThreadPoolExecutor(1).submit(process.stdout.read)


def test_a_real_job_serves_its_metrics_while_it_trains_and_a_taken_port_does_not_stop_it(job: Job) -> None:
    port = free_port()
    job.environment |= {"FT_METRICS_PORT": str(port), "FT_STAGES": "train", "FT_MAX_STEPS": "100000"}
    job.environment["FT_SAVE_STEPS"] = "5"
    process = job.start()
    log = read_aside(process)
    seen = scraped_until(process, port, "checkpoint_age_seconds", "tokens_per_second", "gradient_norm")
    assert value(seen, "finetune_step") > 0 and value(seen, "finetune_steps") == 100000
    assert value(seen, "finetune_loss") > 0 and value(seen, "finetune_tokens_per_second") > 0
    assert "finetune_last_exit_code" not in seen
    assert answer(port, "/healthz")[0] == 200
    second = job.run(FT_RUN_ID="second", FT_STAGES="preflight")
    assert second.code == 0
    assert any("No metrics" in event.get("message", "") for event in second.events)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    assert json.loads(log.result(10).splitlines()[-1])["event"] == "run_ended"
    again = job.start()
    read_aside(again)
    seen = scraped_until(again, port, "last_exit_code", "step")
    assert (value(seen, "finetune_last_exit_code"), value(seen, "finetune_restarts")) == (75, 1)
    again.send_signal(signal.SIGTERM)
    assert again.wait(timeout=120) == 75


def test_the_useful_flops_of_a_lora_training_are_four_per_frozen_and_six_per_trained_weight() -> None:
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from job.training.utilization import peak_flops, useful_flops_per_token

    config = LlamaConfig(vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    frozen = 4 * 8 * 8 + 3 * 8 * 16 + 50 * 8  # attention, MLP and head: the embedding is looked up, not multiplied
    assert useful_flops_per_token(model) == 4 * frozen + 6 * (8 * 2 + 2 * 8)
    assert peak_flops(torch.device("cpu")) is None
