"""Every way the job can end, with its exit code.

    JobError
    ├── SettingsError      78  the environment variables are wrong
    ├── InputError         65  the data, the model or the merged result is not usable
    ├── NodeError          69  this machine is unfit: no GPU, a broken GPU, no disk space, a stage that hangs
    │   ├── MemoryFull     69  the GPU ran out of memory, and a smaller plan is left to try
    │   ├── KernelsFault   69  the job's own kernels crashed the GPU
    │   └── NoProgress     69  too many starts in a row stored nothing new
    ├── PermissionRefused  77  the Hub or S3 refused access, or the model is gated
    ├── TransientError     75  the network or a store failed after all retries
    └── Stopped            75  asked to stop, and the work so far is committed

Any other exception is a bug and exits with 70. The codes come from sysexits.h, so that a Kubernetes
podFailurePolicy and a Slurm script can tell "retry", "retry elsewhere" and "fail" apart.
"""

from __future__ import annotations

import errno
import math
import os
from enum import IntEnum, StrEnum
from pathlib import Path


class ExitCode(IntEnum):
    """The exit codes of the process. sysexits.h defines the values."""

    OK = 0
    BAD_INPUT = 65
    NODE_UNFIT = 69
    BUG = 70
    TRY_AGAIN = 75
    PERMISSION = 77
    SETTINGS = 78


class Retry(StrEnum):
    """Whether, and where, the same job may succeed when it is started again. `slurm/train.sh` acts by this."""

    NO = "no"
    ANYWHERE = "anywhere"
    ELSEWHERE = "elsewhere"  # this node should be left out


class JobError(Exception):
    """A failure that a user can act on: `message` says what happened, `hint` says what to do about it."""

    exit_code = ExitCode.BUG
    retry = Retry.NO

    def __init__(self, message: str, hint: str = "", *, retry: Retry | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.run_id: str | None = None  # of the run that met it, once that is known
        self.hint = hint
        if retry is not None:
            self.retry = retry

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class SettingsError(JobError):
    """One or more environment variables are unknown, malformed or contradict each other."""

    exit_code = ExitCode.SETTINGS


class InputError(JobError):
    """The job cannot work with the dataset, the base model or the merged model."""

    exit_code = ExitCode.BAD_INPUT


class NodeError(JobError):
    """This machine cannot do the work. Another one may, unless `retry` says that the machine is not the reason."""

    exit_code = ExitCode.NODE_UNFIT
    retry = Retry.ELSEWHERE


class MemoryFull(NodeError):
    """The GPU does not have enough memory for the training plan, and a smaller plan is left to try."""


class KernelsFault(NodeError):
    """One of the job's own kernels crashed the GPU and its process. A new process may succeed without these kernels."""


class NoProgress(NodeError):
    """Starting again and again has stored nothing new. Somebody must look before more is paid for."""

    retry = Retry.NO


class PermissionRefused(JobError):
    """A remote service refused access: the credentials are missing, invalid or insufficient."""

    exit_code = ExitCode.PERMISSION


class TransientError(JobError):
    """A remote service failed, and starting again later may succeed."""

    exit_code = ExitCode.TRY_AGAIN
    retry = Retry.ANYWHERE


class Stopped(JobError):
    """The job was asked to stop and did."""

    exit_code = ExitCode.TRY_AGAIN
    retry = Retry.ANYWHERE


_BY_CODE: dict[int, type[JobError]] = {
    ExitCode.SETTINGS: SettingsError,
    ExitCode.BAD_INPUT: InputError,
    ExitCode.NODE_UNFIT: NodeError,
    ExitCode.PERMISSION: PermissionRefused,
    ExitCode.TRY_AGAIN: TransientError,
}


def in_a_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


def from_os_error(error: BaseException) -> JobError | None:
    """The JobError for an operating system error that a user can act on, or None for any other error."""
    if not isinstance(error, OSError):
        return None
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_space(error, where)
    if error.errno == errno.EFBIG:
        return InputError(
            f"A file became larger than the disk has room for{where}.",
            "The dataset unpacks to more than its files show. Set FT_OUTPUT_DIR to a larger volume if it is really that large.",
        )
    if error.errno in (errno.EIO, errno.ESTALE, errno.ENOMEM):
        return NodeError(
            f"The disk or the memory failed{where}: {error.strerror}.",
            "Try another machine. Committed work is intact.",
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return PermissionRefused(
            f"This user is not allowed to read or write{where}: {error.strerror}.",
            "Set FT_OUTPUT_DIR (and FT_STORE_URL) to a folder that this user can write to. In a container, check the volume's owner.",
        )
    return None


# Variables that name folders which libraries fill, and what they mean where they are unset
_FOLDERS = {
    "FT_OUTPUT_DIR": "results",
    "HF_HUB_CACHE": "",
    "HF_DATASETS_CACHE": "",
    "HF_HOME": "~/.cache/huggingface",
    "TRITON_CACHE_DIR": "~/.triton",
    "TMPDIR": "/tmp",  # noqa: S108 (what Python's tempfile uses)
    "FT_STORE_URL": "",
}
_LITTLE = 64 << 20  # bytes: a file system with less has no room for the job's files
# Types of file systems that other machines see too, so that leaving this machine out would help nobody (proc(5), mounts)
_SHARED = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb",
    "fuse",
    "9p",
    "afs",
    "gluster",
    "weka",
    "panfs",
    "virtiofs",
)


def _no_space(error: OSError, where: str) -> NodeError:
    """A full disk, or a quota: which variable names the folder, and whether another machine would have more room."""
    told = {name: os.environ.get(name) or default for name, default in _FOLDERS.items()}
    folders = {name: Path(text).expanduser().absolute() for name, text in told.items() if text and "://" not in text}
    if error.filename:
        place = Path(os.fsdecode(error.filename)).absolute()
        names = [name for name, folder in folders.items() if place.is_relative_to(folder)]
    else:
        names = [name for name, folder in folders.items() if _room_at(folder) < _LITTLE]
        place = folders[names[0]] if names else Path.cwd()
    what = "The disk quota is used up" if error.errno == errno.EDQUOT else "No space left on the disk"
    larger = (
        f"{names[0]} ({folders[names[0]]})" if names else "FT_OUTPUT_DIR, or HF_HOME if the cache of downloads is full,"
    )
    shared = error.errno == errno.EDQUOT or _is_shared(place)
    return NodeError(
        f"{what}{where}.",
        f"Free some space, or set {larger} to a larger volume. Committed work is intact.",
        retry=Retry.ANYWHERE if shared else Retry.ELSEWHERE,
    )


def _room_at(folder: Path) -> float:
    """Bytes that this user may still write at a folder, or where it would be made."""
    there = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), folder)
    try:
        found = os.statvfs(there)
    except OSError:
        return math.inf
    return found.f_bavail * found.f_frsize


def _is_shared(path: Path) -> bool:
    """Whether the file system at `path` is one that other machines see too."""
    path, depth, kind = path.resolve(), 0, ""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for _, place, found, *_ in (line.split() for line in mounts):
        if path.is_relative_to(place) and len(Path(place).parts) >= depth:
            depth, kind = len(Path(place).parts), found
    return kind.startswith(_SHARED)


def is_lost_contact(error: Exception) -> bool:
    """Whether a collective operation failed because another process died or became unreachable."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError", "RendezvousError"):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("gloo", "Gloo", "NCCL", "onnection closed by")
    )


def exit_code_of(error: BaseException | None) -> ExitCode:
    """What the process ends with, given what `main` raised or returned."""
    if error is None:
        return ExitCode.OK
    known = error if isinstance(error, JobError) else from_os_error(error)
    return known.exit_code if known is not None else ExitCode.BUG


def from_code(code: int, message: str, hint: str = "", retry: str | None = None) -> JobError:
    """Rebuild the error that a child process recorded, from its exit code. Unknown codes become a bug."""
    known = Retry(retry) if retry in list(Retry) else None
    return _BY_CODE.get(code, JobError)(message, hint, retry=known)
