"""Everything the job can end with, and the exit code each ending has.

    JobError
    ├── SettingsError      78  the environment variables are wrong
    ├── InputError         65  the data, the model or the merge proof is not acceptable
    ├── NodeError          69  this machine is unfit: no GPU, a broken GPU, no space
    │   ├── MemoryFull     69  the GPU's memory does not suffice, and a plan that needs less is left
    │   └── KernelsFault   69  the GPU does not survive the job's own kernels
    ├── PermissionRefused  77  the Hub or S3 said no, or the model is gated
    ├── TransientError     75  the network or a store failed past its retries
    └── Stopped            75  asked to stop; the work so far is committed

Whatever else is raised is a bug and ends with 70. The codes are those of sysexits.h, so that a Kubernetes
podFailurePolicy and a Slurm script can tell "retry", "retry elsewhere" and "fail" apart.
"""

from __future__ import annotations

import errno
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process ends with; the values are fixed by sysexits.h."""

    OK = 0
    BAD_INPUT = 65
    NODE_UNFIT = 69
    BUG = 70
    TRY_AGAIN = 75
    PERMISSION = 77
    SETTINGS = 78


class JobError(Exception):
    """An ending that a user can act on: `message` says what happened, `hint` what to do about it."""

    exit_code = ExitCode.BUG

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class SettingsError(JobError):
    """One or more environment variables are unknown, malformed or do not go together."""

    exit_code = ExitCode.SETTINGS


class InputError(JobError):
    """The dataset, the base model or the merged model is not what the job can work with."""

    exit_code = ExitCode.BAD_INPUT


class NodeError(JobError):
    """This machine cannot do the work; another one may."""

    exit_code = ExitCode.NODE_UNFIT


class MemoryFull(NodeError):
    """The GPU's memory does not suffice for the plan of the training, and one that needs less is left."""


class KernelsFault(NodeError):
    """A kernel of the job's own ended in a fault of the GPU, which lost the process; without them another one may do."""


class PermissionRefused(JobError):
    """A remote service knows us and refuses, or does not know us."""

    exit_code = ExitCode.PERMISSION


class TransientError(JobError):
    """A remote service failed in a way that a later start may not see."""

    exit_code = ExitCode.TRY_AGAIN


class Stopped(JobError):
    """The job was asked to stop and did."""

    exit_code = ExitCode.TRY_AGAIN


_BY_CODE: dict[int, type[JobError]] = {
    ExitCode.SETTINGS: SettingsError,
    ExitCode.BAD_INPUT: InputError,
    ExitCode.NODE_UNFIT: NodeError,
    ExitCode.PERMISSION: PermissionRefused,
    ExitCode.TRY_AGAIN: TransientError,
}


def in_a_line(error: BaseException) -> str:
    """Its type and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


def from_os_error(error: BaseException) -> JobError | None:
    """What the operating system's refusals mean for a user; None for those that mean nothing in general."""
    if not isinstance(error, OSError):
        return None
    where = f" at {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NodeError(
            f"No space left on the disk{where}.",
            "Free space or set FT_OUTPUT_DIR to a larger volume; what was committed is intact.",
        )
    if error.errno in (errno.EIO, errno.ESTALE, errno.ENOMEM):
        return NodeError(
            f"The disk or the memory fails{where}: {error.strerror}.",
            "Another machine may do; what was committed is intact.",
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return PermissionRefused(
            f"This user may not write or read{where}: {error.strerror}.",
            "Set FT_OUTPUT_DIR (and FT_STORE_URL) to a folder that it may write; in a container, check the volume's owner.",
        )
    return None


def is_lost_contact(error: Exception) -> bool:
    """Whether a collective operation failed because another process, or the network to it, is gone."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError", "RendezvousError"):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("gloo", "Gloo", "NCCL", "onnection closed by")
    )


def from_code(code: int, message: str, hint: str = "") -> JobError:
    """Rebuild the error that a child process wrote down, from its exit code; unknown codes become a bug."""
    return _BY_CODE.get(code, JobError)(message, hint)
