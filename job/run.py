"""Run: the one value that every part of the job receives."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import durability
from job.cluster import Node, scheduler_run_id, this_node
from job.environment.local_files import SOURCES, is_local
from job.errors import Stopped
from job.gpus import visible_gpus
from job.paths import Paths
from job.settings import STAGE_NAMES, Settings, default_value
from job.storage import Store, open_store


@dataclass(frozen=True)
class Run:
    """What every stage works with: the settings, the file names, this process's place in the job, and the store."""

    settings: Settings
    paths: Paths
    node: Node
    store: Store

    @classmethod
    def of(cls, settings: Settings) -> Run:
        """The run that these settings name. The same environment gives the same run in every process."""
        run_id = (
            settings.run_id
            or scheduler_run_id()
            or f"run-{settings.fingerprint('train', but=('nproc_per_node',))[:12]}"
        )
        node = this_node(settings.nnodes, settings.node_rank)
        paths = Paths(settings.output_dir.absolute(), run_id, node.index)
        url = settings.store_url or str(paths.output_dir / "store")
        return cls(settings, paths, node, open_store(url))

    @property
    def id(self) -> str:
        return self.paths.run_id

    def fingerprint(self, stage: str) -> str:
        """SHA-256 of what the result of `stage` depends on: settings, and the content of a chat template's file.

        Where a local model or dataset lies does not count after `prepare`: the ledger compares its content. Nor does
        FT_NPROC_PER_NODE, whose meaning is the number of processes that a checkpoint was made by.
        """
        values = self.settings.affecting(stage)
        chosen = {name: value for name, value in values.items() if value != default_value(name)}
        if stage not in ("download", "prepare"):
            chosen.pop("nproc_per_node", None)
            for name in SOURCES:
                if name in chosen and is_local(name, chosen[name]):
                    del chosen[name]
        if self.takes_over and "train" in STAGE_NAMES[: STAGE_NAMES.index(stage) + 1]:
            chosen["trained"] = False
        if "chat_template" in chosen and (content := template_content(self.settings)) is not None:
            chosen["chat_template"] = content
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()

    def made(self, stage: str, fingerprint: str) -> bool:
        """Whether these settings made what has `fingerprint`, as this version of the job or an earlier one says it."""
        return fingerprint in (self.fingerprint(stage), self.settings.fingerprint(stage))

    @property
    def takes_over(self) -> bool:
        """Whether the adapter of FT_ADAPTER_NAME is merged and published as it is, without training."""
        return self.settings.adapter_name is not None and "train" not in self.settings.stages

    @property
    def processes_per_node(self) -> int:
        """Training processes on this machine: one per visible GPU, unless a number is set."""
        if self.settings.nproc_per_node != "auto":
            return int(self.settings.nproc_per_node)
        return max(1, len(visible_gpus())) if self.settings.device == "cuda" else 1

    def check_stop(self) -> None:
        """Raise Stopped if a stop was requested. Stages call this between units of work."""
        if self.stop_requested():
            raise Stopped("Stopped, as requested.", "Start the job again to continue from here.")

    def stop_requested(self) -> bool:
        return self.paths.stop_file.exists()

    def stop_deadline(self) -> float | None:
        """The deadline of a requested stop, in seconds since the epoch, or None if none was requested."""
        try:
            return float(read_json(self.paths.stop_file))
        except FileNotFoundError:
            return None


def template_content(settings: Settings) -> str | None:
    """The SHA-256 of the file that FT_CHAT_TEMPLATE names, or None if it names none."""
    file = Path(settings.chat_template).expanduser()
    if settings.chat_template in ("auto", "llama-2", "chatml") or not file.is_file():
        return None
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically and durably: a reader sees either all of it or the previous file, after a power cut too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid():08x}")
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as stream:  # a file's name may be no text
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    durability.replace(partial, path)


def now() -> str:
    """The current time in UTC as RFC 3339, for records that people read."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
