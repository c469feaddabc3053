"""A stage's own process: `python -m job.stages NAME`, started by the supervisor or, for training, by torchrun."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from job.cluster import keep_private
from job.errors import (
    ExitCode,
    JobError,
    NodeError,
    PermissionRefused,
    Retry,
    TransientError,
    from_os_error,
    is_lost_contact,
)
from job.guard.secrets import masked, secret_values
from job.leave import leave
from job.report.events import emit
from job.run import Run, write_json
from job.settings import Settings
from job.stages import STAGES

_PR_SET_PDEATHSIG = 1
# as datasets, torch and multiprocess say it
_DEAD_WORKER = re.compile(
    r"abruptly died|DataLoader worker .*(killed by signal|exited unexpectedly)|terminated abruptly"
)
_WITH_SECRETS = ("preflight", "download", "publish_adapter", "publish")
_WITH_MODEL = ("train", "sample", "merge", "export")


def main(name: str) -> int:
    """Run one stage to its end. Returns an exit code of `job.errors.ExitCode`. The reason is in the error file."""
    _die_with_parent()
    if name in _WITH_SECRETS:
        keep_private()  # not where GPUs work: NCCL reads its fellows' memory
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # stop requests come through the stop file, at a moment that we choose
    settings = Settings()  # the supervisor has checked them; some secrets are missing here on purpose
    stage = next(stage for stage in STAGES if stage.name == name)
    run = Run.of(settings)
    processes = run.processes_per_node if stage.per_gpu else 1
    launches = stage.per_gpu and (processes > 1 or run.node.count > 1) and "RANK" not in os.environ
    try:
        if "download" in stage.needs:
            _read_ahead(run)
        if stage.per_gpu:  # batches differ in length, and gaps between blocks of fixed size would be lost
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        if stage.per_gpu and processes == 1 and settings.device_map == "auto":
            _see_one_gpu()
        if launches:
            from job.training.launcher import launch

            return launch(run.node, name, processes, run.paths.meeting_file)
        if settings.device == "cuda" and name in _WITH_MODEL:
            from job.model.startup import import_bitsandbytes_uncompiled

            import_bitsandbytes_uncompiled()
        function: Callable[[Run], None] = getattr(importlib.import_module(f"job.stages.{name}"), name)
        function(run)
    except Exception as error:  # the boundary: everything becomes an exit code and a written reason
        return _write_down(run, name, error, launcher=launches)
    return ExitCode.OK


def end_as(name: str, error: Exception) -> NoReturn:
    """End this process now, from any thread, as if its stage had raised `error`."""
    os._exit(_write_down(Run.of(Settings()), name, error, launcher=False))


def _see_one_gpu() -> None:
    """A process that trains alone sees the first GPU only: transformers would spread it over all that it sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


def _read_ahead(run: Run) -> None:
    """Let the kernel read the weights from disk while Python spends seconds on imports."""
    if sys.platform != "linux":
        return
    for file in run.paths.model_dir.glob("*.safetensors"):
        with contextlib.suppress(OSError), file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _die_with_parent() -> None:
    """Have the kernel kill this process when its supervisor or torchrun dies, so that it stops writing (prctl(2))."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = os.environ.get("JOB_PARENT_PID")
        if parent is not None and int(parent) != os.getppid():
            os._exit(ExitCode.TRY_AGAIN)  # the parent died before the call above


def _write_down(run: Run, name: str, error: Exception, *, launcher: bool) -> int:
    known = _as_job_error(error)
    if known is None:
        traceback.print_exc()
        known = JobError(
            f"{type(error).__name__}: {error}",
            f"This is a bug, or a case that nobody has met before. See {run.paths.log_file(name)}.",
        )
    secrets = secret_values()
    record = {
        "exit_code": int(known.exit_code),
        "message": masked(known.message, secrets),
        "hint": masked(known.hint, secrets),
        "kind": type(known).__name__,
        "retry": known.retry,
    }
    print(record["message"], flush=True)
    emit("failed", launcher=launcher, **record)  # on a full disk the file below cannot be written
    if not launcher:  # this file would be its first process's
        with contextlib.suppress(OSError):
            write_json(run.paths.error_file(name, run.node.rank), record)
    return int(known.exit_code)


def _as_job_error(error: Exception) -> JobError | None:
    if isinstance(error, JobError):
        return error
    if (refusal := from_os_error(error)) is not None:
        return refusal
    in_rust = re.search(r"os error (\d+)", str(error))  # as safetensors words an OSError
    if in_rust and (refusal := from_os_error(OSError(int(in_rust[1]), str(error)))) is not None:
        return refusal
    if type(error).__module__.startswith("wandb"):
        return PermissionRefused(
            f"W&B refused or could not be reached: {error}",
            "Check WANDB_API_KEY and the network, set WANDB_MODE=offline, or unset WANDB_API_KEY to train without W&B.",
        )
    if is_lost_contact(error):
        return TransientError(
            f"Lost contact with the other training processes: {str(error).splitlines()[0]}",
            "Start the job again: it resumes from the last checkpoint.",
        )
    if _DEAD_WORKER.search(str(error)) or type(error).__name__ == "BrokenProcessPool":
        return NodeError(
            f"A worker process of the stage was killed: {str(error).splitlines()[0]}",
            "The kernel does this when the machine's memory, or /dev/shm, runs out: ask for more (--mem, the pod's limit, "
            "docker's --shm-size).",
            retry=Retry.ANYWHERE,
        )
    if type(error).__name__ == "OutOfMemoryError":  # torch's class, and only stages that use torch may import it
        return NodeError(
            f"The GPU ran out of memory: {str(error).splitlines()[0]}",
            "Set FT_GRADIENT_CHECKPOINTING=true, halve FT_PER_DEVICE_TRAIN_BATCH_SIZE and double FT_GRADIENT_ACCUMULATION_STEPS "
            "(the same mathematics), lower FT_MAX_SEQ_LENGTH, or rent a larger card.",
        )
    return None


if __name__ == "__main__":
    leave(main(sys.argv[1]))
