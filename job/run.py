"""Run: the one value that every part of the job receives."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.cluster import Node, scheduler_run_id, this_node, visible_gpus
from job.errors import Stopped
from job.paths import Paths
from job.settings import Settings
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
        run_id = settings.run_id or scheduler_run_id() or f"run-{settings.fingerprint('train')[:12]}"
        node = this_node(settings.nnodes, settings.node_rank)
        paths = Paths(settings.output_dir.absolute(), run_id, node.index)
        url = settings.store_url or str(paths.output_dir / "store")
        return cls(settings, paths, node, open_store(url))

    @property
    def id(self) -> str:
        return self.paths.run_id

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


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically: a reader sees either all of it or the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def now() -> str:
    """The current time in UTC as RFC 3339, for records that people read."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
