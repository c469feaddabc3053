"""The whole job from outside: environment variables in, published model out, whatever happens in between."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from job.settings import Settings
from job.stages import stages_of
from tests.checkpoints.test_kernels import make_kernel
from tests.conftest import LIGHTHOUSE, Job, contents, finished, is_running, published, read_until, session_folder
from tests.model.families import FAMILIES, base_model

# One worker makes the uninterrupted run that all of these tests look at.
shares_the_uninterrupted_run = pytest.mark.xdist_group("uninterrupted")


@shares_the_uninterrupted_run
def test_the_published_folder_holds_model_adapter_card_curve_samples_and_proof(uninterrupted: Job) -> None:
    names = set(contents(published(uninterrupted)))
    assert names == {
        "README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "config.json", "finetune_run.json",
        "generation_config.json", "loss_curve.png", "merge_proof.json", "model.safetensors", "samples.json", "tokenizer.json",
        "tokenizer_config.json", "data_report.html",
    }  # fmt: skip
    modules = json.loads((published(uninterrupted) / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert modules["target_modules"] == sorted(modules["target_modules"]) == ["q_proj", "v_proj"]
    card = (published(uninterrupted) / "README.md").read_text(encoding="utf-8")
    assert all(
        heading in card
        for heading in ("## Training", "## Data", "## Answers before and after", "## Proof", "## Reproduce")
    )
    assert "| `FT_LORA_R` | `4` |" in card
    assert uninterrupted.environment["FT_OUTPUT_DIR"] not in card  # a model card must not show paths of this machine
    assert (published(uninterrupted) / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


@shares_the_uninterrupted_run
def test_plain_transformers_loads_the_published_model_and_answers_as_the_sample_stage_did(uninterrupted: Job) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = published(uninterrupted)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        AutoTokenizer.from_pretrained(folder),
    )
    for sample in json.loads((folder / "samples.json").read_text(encoding="utf-8")):
        messages = [{"role": "user", "content": sample["prompt"]}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert text == sample["tuned"]


@shares_the_uninterrupted_run
def test_a_second_run_after_a_complete_one_does_nothing_and_says_so(uninterrupted: Job) -> None:
    before = contents(Path(uninterrupted.environment["FT_OUTPUT_DIR"]))
    result = uninterrupted.run()
    assert result.code == 0
    assert set(result.ended.values()) == {"skipped"}
    assert "nothing to do" in result.stdout
    assert contents(Path(uninterrupted.environment["FT_OUTPUT_DIR"])) == before


def test_a_dataset_that_changed_under_its_name_is_not_mixed_into_the_run(job: Job, tmp_path: Path) -> None:
    """Once something was trained on it. Until then, what is there now is what the run is about."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(LIGHTHOUSE.read_bytes())
    assert job.run(FT_STAGES="prepare", FT_DATASET_NAME=str(file)).code == 0
    file.write_bytes(LIGHTHOUSE.read_bytes().replace(b"Paris", b"Parma"))
    result = job.run(FT_STAGES="train", FT_DATASET_NAME=str(file))
    assert result.code == 0, result.stderr
    assert result.ended["prepare"] == "done"  # what was prepared from the former rows does not count
    file.write_bytes(LIGHTHOUSE.read_bytes().replace(b"Paris", b"Padua"))
    result = job.run(FT_DATASET_NAME=str(file))
    assert result.code == 78
    assert "dataset/rows.jsonl" in result.error["message"]


def test_a_complete_run_is_complete_on_a_machine_that_has_only_the_store(uninterrupted: Job, tmp_path: Path) -> None:
    store = str(Path(uninterrupted.environment["FT_OUTPUT_DIR"]) / "store")
    result = uninterrupted.run(FT_OUTPUT_DIR=str(tmp_path / "elsewhere"), FT_STORE_URL=store)
    assert result.code == 0, result.stderr
    assert set(result.ended.values()) == {"skipped"}


@shares_the_uninterrupted_run
def test_status_and_plan_report_what_is_there_and_change_nothing(uninterrupted: Job) -> None:
    before = contents(Path(uninterrupted.environment["FT_OUTPUT_DIR"]))
    status, plan = uninterrupted.run("status"), uninterrupted.run("plan")
    assert (status.code, plan.code) == (0, 0)
    assert status.stdout.count(" complete since ") == 6
    assert re.search(
        r"checkpoints committed: step 6(, step [24])?$", status.stdout, re.MULTILINE
    )  # uploads may fall behind
    assert "preflight → download → prepare → train → sample → merge → publish" in plan.stdout
    assert "steps         6" in plan.stdout
    assert contents(Path(uninterrupted.environment["FT_OUTPUT_DIR"])) == before


def test_a_plan_for_a_run_that_does_not_exist_writes_nothing(job: Job) -> None:
    assert job.run("plan").code == 0
    status = job.run("status")
    assert status.code == 78
    assert "has no run 'test-run'" in status.error["message"]
    assert not Path(job.environment["FT_OUTPUT_DIR"]).exists()


@shares_the_uninterrupted_run
def test_other_settings_under_the_same_run_id_are_refused_by_name(uninterrupted: Job) -> None:
    result = uninterrupted.run(FT_LORA_R="8", FT_LEARNING_RATE="0.5")
    assert result.code == 78
    assert "FT_LORA_R: was 4, is now 8" in result.error["message"]
    assert "FT_LEARNING_RATE: was 0.01, is now 0.5" in result.error["message"]


@shares_the_uninterrupted_run
def test_killing_after_every_stage_and_starting_again_publishes_the_same_files(job: Job, uninterrupted: Job) -> None:
    for stage in ("preflight", "download", "prepare", "train", "sample", "merge"):
        process = job.start()
        read_until(process, event="stage_ended", stage=stage)
        process.kill()
        process.communicate()
        assert not published(job).exists()
    result = job.run()
    assert result.code == 0, result.stderr
    assert result.ended == {name: "done" if name in ("preflight", "publish") else "skipped" for name in result.ended}
    assert contents(published(job)) == contents(published(uninterrupted))


@shares_the_uninterrupted_run
def test_a_stop_request_during_training_ends_with_75_and_the_next_start_reaches_the_same_adapter(
    job: Job, uninterrupted: Job
) -> None:
    process = job.start(FT_SAVE_STEPS="1")
    read_until(process, event="progress", stage="train", done=1)
    process.send_signal(signal.SIGTERM)
    stopped = finished(process, *process.communicate(timeout=120))
    assert stopped.code == 75
    assert stopped.error["exit_code"] == 75
    status = job.run("status").stdout
    assert "train      not complete" in status
    assert "checkpoints committed: step" in status
    again = job.run(FT_SAVE_STEPS="1")
    assert again.code == 0, again.stderr
    assert any("Resuming from the checkpoint of step" in event.get("message", "") for event in again.events)
    name = "adapter/adapter_model.safetensors"
    assert contents(published(job))[name] == contents(published(uninterrupted))[name]


def test_a_new_machine_resumes_from_the_checkpoint_in_s3_with_the_compiled_kernels(
    job: Job, s3_environment: None, tmp_path: Path
) -> None:
    job.environment |= {
        "FT_STORE_URL": "s3://bucket/runs", "FT_STAGES": "train,sample", "FT_SAVE_STEPS": "1", "FT_MAX_STEPS": "40",
    }  # fmt: skip
    kernel = make_kernel(tmp_path / "first machine" / "cache" / "triton", "norm")
    process = job.start(FT_OUTPUT_DIR=str(tmp_path / "first machine"), FT_LOG_LEVEL="debug")
    read_until(process, message="Stored 1 compiled kernels.")
    process.send_signal(signal.SIGTERM)
    assert finished(process, *process.communicate(timeout=120)).code == 75
    second = job.run(FT_OUTPUT_DIR=str(tmp_path / "second machine"))
    assert second.code == 0, second.stderr
    fetched = tmp_path / "second machine" / "cache" / "triton" / kernel.name / "_norm.cubin"
    assert fetched.read_bytes() == (kernel / "_norm.cubin").read_bytes()
    assert any("Resuming from the checkpoint of step" in event.get("message", "") for event in second.events)
    third = job.run(FT_OUTPUT_DIR=str(tmp_path / "third machine"))
    assert third.ended == {"train": "skipped", "sample": "skipped"}


def test_an_adapter_is_trained_and_resumed_in_float32_bit_for_bit_beside_products_in_16_bits(
    job: Job, tmp_path: Path
) -> None:
    """trl would hold it in bfloat16, in which most updates round to nothing."""
    job.environment |= {"FT_STAGES": "train", "FT_BNB_4BIT_COMPUTE_DTYPE": "bfloat16", "FT_SAVE_STEPS": "1"}
    adapter = Path("runs/test-run/train/adapter/adapter_model.safetensors")
    straight = job.run(FT_OUTPUT_DIR=str(tmp_path / "straight"))
    assert straight.code == 0, straight.stderr
    process = job.start()
    read_until(process, event="progress", stage="train", done=1)
    process.send_signal(signal.SIGTERM)
    assert finished(process, *process.communicate(timeout=120)).code == 75
    assert job.run().code == 0
    stopped = Path(job.environment["FT_OUTPUT_DIR"]) / adapter
    assert stopped.read_bytes() == (tmp_path / "straight" / adapter).read_bytes()
    assert {value.dtype for value in load_file(stopped).values()} == {torch.float32}


def test_a_model_of_another_architecture_is_trained_by_fused_layers_merged_and_proved(job: Job, tmp_path: Path) -> None:
    """Phi's layers make queries, keys and values by one product, and peft has no targets for it."""
    folder = tmp_path / "phi"
    config = next(one for one in FAMILIES if one.name == "phi 4 mini").config(vocab_size=512)
    base_model(config, attention="eager").save_pretrained(folder)
    for file in Path(job.environment["FT_MODEL_NAME"]).glob("*token*"):
        shutil.copy(file, folder)
    job.environment |= {
        "FT_MODEL_NAME": str(folder), "FT_DECODER_LAYERS": "fused", "FT_PADDING_FREE": "true", "FT_MAX_STEPS": "2",
        "FT_LORA_R": "12", "FT_LORA_TARGET_MODULES": "auto",
    }  # fmt: skip
    done = job.run()
    assert done.code == 0, done.stderr
    told = " ".join(event.get("message", "") for event in done.events)
    assert "Plan: weights dequantized" in told and "Merge verified" in told
    modules = json.loads((published(job) / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (modules["target_modules"], modules["r"]) == (["qkv_proj"], 12)


def test_the_stages_of_tests_are_forked_and_not_started(job: Job) -> None:
    """Otherwise the tests only take much longer, and nobody would know why."""
    result = job.run(FT_MAX_STEPS="1")
    assert result.code == 0, result.stderr
    forked = (session_folder() / "forks").read_text(encoding="utf-8").split()
    assert {stage.name for stage in stages_of(Settings())} <= set(forked)


def test_when_the_supervisor_is_killed_its_stage_dies_with_it(job: Job) -> None:
    job.forks = False
    process = job.start()
    read_until(process, event="stage_started", stage="prepare")
    listing, children = Path(f"/proc/{process.pid}/task/{process.pid}/children"), []
    while not children:  # a stage is announced just before it is started
        assert process.poll() is None
        children = listing.read_text(encoding="utf-8").split()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(is_running(int(child)) for child in children):
        assert time.monotonic() < deadline, "a stage outlived its supervisor"
        time.sleep(0.05)


def test_a_crashed_stage_says_why_and_where_its_output_is(job: Job) -> None:
    """A truncated model file passes preflight, which does not read weights, and fails when they are loaded."""
    model = Path(job.environment["FT_OUTPUT_DIR"]).parent / "broken-model"
    model.mkdir()
    for file in Path(job.environment["FT_MODEL_NAME"]).iterdir():
        data = file.read_bytes()
        (model / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    result = job.run(FT_MODEL_NAME=str(model))
    assert result.code == 65, result.stderr
    assert "cannot be loaded" in result.error["message"]


def test_relative_paths_are_relative_to_the_folder_that_the_job_is_started_in(job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "somewhere else"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(LIGHTHOUSE.read_bytes())
    job.environment |= {"JOB_TEST_CWD": str(folder), "FT_OUTPUT_DIR": "out"}
    result = job.run(FT_STAGES="download", FT_DATASET_NAME="rows.jsonl")
    assert result.code == 0, result.stderr
    assert (folder / "out" / "runs" / "test-run" / "download" / "dataset" / "rows.jsonl").is_file()


def test_secrets_reach_neither_logs_nor_files_nor_the_model(job: Job) -> None:
    canaries = {
        "HF_TOKEN": "hf_canary_AAAA",
        "AWS_SECRET_ACCESS_KEY": "aws_canary_BBBB",
        "AWS_ACCESS_KEY_ID": "aws_canary_CCCC",
    }
    result = job.run(FT_LOG_LEVEL="debug", FT_MAX_STEPS="1", **canaries)
    assert result.code == 0, result.stderr
    everything = [result.stdout.encode(), result.stderr.encode()]
    everything += [path.read_bytes() for path in Path(job.environment["FT_OUTPUT_DIR"]).rglob("*") if path.is_file()]
    for canary in canaries.values():
        assert not [data for data in everything if canary.encode() in data]
    logged = [event for event in result.events if event["level"] == "debug"]
    assert logged  # otherwise there was nothing to search at this log level


def test_a_folder_named_job_in_the_working_directory_is_not_mistaken_for_the_code(job: Job, tmp_path: Path) -> None:
    decoy = tmp_path / "elsewhere" / "job"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise SystemExit('not this one')\n", encoding="utf-8")
    job.environment["JOB_TEST_CWD"] = str(decoy.parent)
    assert job.run(FT_STAGES="preflight").code == 0
