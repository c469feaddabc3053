"""Prometheus metrics of the job, and a health check that fails when a stage stalls.

Names start with `finetune_`. Units and suffixes follow Prometheus' conventions (prometheus.io/docs/practices/naming).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Enum, Info, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from job import __version__
from job.gpus import gpu_states
from job.report import endpoint
from job.settings import STAGE_NAMES

_FIGURES = {
    "loss": ("finetune_loss", "Training loss at the last logged step, in nats per token."),
    "learning_rate": ("finetune_learning_rate", "Learning rate at the last logged step."),
    "tokens_per_second": ("finetune_tokens_per_second", "Training tokens per second, over all GPUs."),
    "mfu": ("finetune_mfu_ratio", "Model FLOPs utilization: useful FLOPs relative to the GPU's dense bfloat16 peak."),
    "eval_loss": ("finetune_eval_loss", "Loss of the last evaluation, in nats per learned token."),
    "grad_norm": ("finetune_gradient_norm", "Norm of all gradients before clipping, at the last logged step."),
}


class Metrics:
    """The metrics of one start of the job. The supervisor reports what happens, and `serve` exposes it.

    `gpus` is how many GPUs this machine's part of the job holds. Only the first node `stores`, and counts starts: on others
    the age of the last checkpoint would grow without end.
    """

    def __init__(
        self,
        run_id: str,
        stall_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        gpus: int = 0,
        stores: bool = True,
    ) -> None:
        self._stall_seconds, self._clock, self._gpus, self._stores = stall_seconds, clock, gpus, stores
        self._spent, self._since = {"training": 0.0, "saving": 0.0, "waiting": 0.0, "lost": 0.0}, clock()
        self._reached: int | None = None  # the last step that training reported, while it runs
        self._moved_at: float | None = None
        self._last_progress: tuple[Any, Any] = (None, None)
        self._committed_at: float | None = None
        self._offered_at: float | None = None
        self._saved_at: float | None = None  # when the checkpoint that was stored last was written
        self._last_exit_code: int | None = None
        self._upload_seconds: float | None = None
        self._trains_since: float | None = None
        self._steps: tuple[int, int] | None = None  # taken, and in total
        self._first_step: tuple[int, float] | None = None  # of this start, and when it was reported
        self._stepped_at = clock()
        self._figures: dict[str, float] = {}
        registry = self._registry = CollectorRegistry()
        Info("finetune_run", "The run that this job is working on.", registry=registry).info({"run_id": run_id})
        Info("finetune_build", "The version of this job.", registry=registry).info({"version": __version__})
        self._stage = Enum(
            "finetune_stage", "The stage that is running.", states=["none", *STAGE_NAMES], registry=registry
        )
        stored = registry if stores else None
        self._restarts = Counter("finetune_restarts", "Earlier starts of this run.", registry=stored)
        self._failed_uploads = Counter(
            "finetune_failed_uploads", "Tries to store a checkpoint that failed.", registry=stored
        )
        self._xids = Counter(
            "finetune_gpu_xid_errors",
            "Errors of a GPU that its driver reported, by NVIDIA's Xid number.",
            labelnames=["gpu", "xid"],
            registry=registry,
        )
        registry.register(_Now(self))

    # -- what happens -----------------------------------------------------------------------------------------------

    def attempt(self, number: int, last_exit_code: int | None = None) -> None:
        """Record the number of this attempt, counted from 1, and how the last one ended, if it could say so."""
        self._restarts.inc(number - 1)
        self._last_exit_code = last_exit_code

    def lost(self, seconds: float) -> None:
        """Record the training time of the last attempt whose steps no checkpoint has."""
        self._spent["lost"] = seconds

    def stage(self, name: str | None) -> None:
        self._stage.state(name or "none")
        self._spend("waiting")
        self._reached = None
        if name == "train" and self._trains_since is None:
            self._trains_since = self._clock()

    def working(self, under_way: bool) -> None:
        """Record whether a stage's process is at work. Only then does a lack of progress count as a stall."""
        self._moved_at = self._clock() if under_way else None

    def moved(self) -> None:
        """The stage has made progress."""
        if self._moved_at is not None:
            self._moved_at = self._clock()

    def progress(self, stage: str, event: dict[str, Any]) -> None:
        if stage != "train":
            self.moved()
            return
        now = (event["done"], event.get("evaluated"))
        if now != self._last_progress and self._moved_at is not None:
            self._last_progress, self._moved_at = now, self._clock()
        if self._reached is None or event["done"] > self._reached:
            self._spend("waiting" if self._reached is None else "training")
            self._reached, self._stepped_at = event["done"], self._since
        self._steps = event["done"], event["total"]
        if self._first_step is None:
            self._first_step = event["done"], self._clock()
        self._figures |= {name: float(event[name]) for name in (*_FIGURES, "tokens") if name in event}

    def checkpoint_offered(self, save_seconds: float = 0.0) -> None:
        """Record that a checkpoint on the local disk is waiting to be stored. Training stood still for `save_seconds`."""
        if self._reached is not None:
            saving = min(save_seconds, self._clock() - self._since)
            self._since += saving
            self._spent["saving"] += saving
        if self._offered_at is None:
            self._offered_at = self._clock()

    def checkpoint_committed(self, seconds: float) -> None:
        self._saved_at = self._offered_at
        self._committed_at, self._offered_at, self._upload_seconds = self._clock(), None, seconds

    def gpu_failed(self, gpu: int, xid: int) -> None:
        self._xids.labels(gpu, xid).inc()

    def upload_failed(self) -> None:
        self._failed_uploads.inc()

    def _spend(self, use: str) -> None:
        """Count the time since the last count as `training` or `waiting`."""
        now = self._clock()
        self._spent[use] += now - self._since
        self._since = now

    # -- what others read -------------------------------------------------------------------------------------------

    def unsaved_seconds(self) -> float:
        """The training time up to the last step that no stored checkpoint has."""
        if self._first_step is None:
            return 0.0
        return max(0.0, self._stepped_at - (self._saved_at if self._saved_at is not None else self._first_step[1]))

    def stalled_seconds(self) -> float:
        """Seconds since the stage at work last made progress, or 0 if none is at work."""
        return 0.0 if self._moved_at is None else self._clock() - self._moved_at

    def healthy(self) -> bool:
        return self.stalled_seconds() <= self._stall_seconds

    def moments(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The current values of metrics that change with time alone, and of those that have none at first.

        A series that reads 0 before its first value would look like a loss of 0, or like a training that stands still.
        """
        if (tokens := self._figures.get("tokens")) is not None:
            yield CounterMetricFamily(
                "finetune_tokens", "Tokens trained on since the run started, over all GPUs.", tokens
            )
        for name, value in self._figures.items():
            if name == "tokens":
                continue
            yield GaugeMetricFamily(*_FIGURES[name], value)
        if self._steps is not None:
            done, total = self._steps
            yield GaugeMetricFamily("finetune_step", "Optimizer steps taken since the run started.", done)
            yield GaugeMetricFamily("finetune_steps", "Optimizer steps that the run will take in total.", total)
            if (left := self._seconds_left(done, total)) is not None:
                told = "Time that the remaining steps will take at this start's rate."
                yield GaugeMetricFamily("finetune_remaining_seconds", told, left)
        if self._stores:
            yield from self._storing()
        stalled = "Time since the running stage last made progress."
        yield GaugeMetricFamily("finetune_stalled_seconds", stalled, self.stalled_seconds())
        if self._last_exit_code is not None:
            told = "Exit code of the last start, unless it was killed."
            yield GaugeMetricFamily("finetune_last_exit_code", told, self._last_exit_code)
        if self._gpus:
            yield self._gpu_seconds()
        yield from _gpu_metrics()

    def _storing(self) -> Iterator[GaugeMetricFamily]:
        since = self._committed_at if self._committed_at is not None else self._trains_since
        if since is not None:
            told = "Time since a checkpoint was last stored, or since the training began."
            yield GaugeMetricFamily("finetune_checkpoint_age_seconds", told, self._clock() - since)
        lag = self._clock() - self._offered_at if self._offered_at is not None else self._upload_seconds
        if lag is not None:
            yield GaugeMetricFamily("finetune_upload_lag_seconds", "How far the store lags behind the local disk.", lag)

    def _gpu_seconds(self) -> CounterMetricFamily:
        """The time of a step counts when the step is reported, all other time as it passes."""
        told = (
            "Time that this start held its GPUs: from step to step (training), to write checkpoints (saving), or in anything "
            "else (waiting). And what the last start trained after its last stored checkpoint (lost)."
        )
        passing = self._clock() - self._since if self._reached is None else 0.0
        family = CounterMetricFamily("finetune_gpu_seconds", told, labels=["use"])
        for use, seconds in self._spent.items():
            family.add_metric([use], self._gpus * (seconds + (passing if use == "waiting" else 0.0)))
        return family

    def _seconds_left(self, done: int, total: int) -> float | None:
        if self._first_step is None or done <= self._first_step[0]:
            return None
        first, moment = self._first_step
        return (total - done) * (self._clock() - moment) / (done - first)

    def serve(self, address: str, port: int) -> None:
        """Serve `/metrics` and `/healthz` from a thread. Raises OSError if the address or the port cannot be used."""
        metrics = make_wsgi_app(self._registry)

        def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if environ["PATH_INFO"] != "/healthz":
                answer: Iterable[bytes] = metrics(environ, start_response)
                return answer
            status = "200 OK" if self.healthy() else "503 Service Unavailable"
            start_response(status, [("Content-Type", "text/plain")])
            return [f"no progress for {self.stalled_seconds():.0f} s\n".encode()]

        endpoint.serve(address, port, application)


def _gpu_metrics() -> Iterator[GaugeMetricFamily]:
    memory = GaugeMetricFamily("finetune_gpu_memory_bytes", "Memory in use on each GPU.", labels=["gpu"])
    busy = GaugeMetricFamily(
        "finetune_gpu_utilization_ratio", "Part of the last moments in which a kernel ran on each GPU.", labels=["gpu"]
    )
    power = GaugeMetricFamily("finetune_gpu_power_watts", "Power that each GPU draws.", labels=["gpu"])
    for index, state in gpu_states().items():
        for metric, value in ((memory, state.memory_used), (busy, state.utilization), (power, state.watts)):
            if value is not None:
                metric.add_metric([str(index)], value)
    yield from (memory, busy, power)


class _Now:
    """A collector that computes its metrics on each scrape."""

    def __init__(self, metrics: Metrics) -> None:
        self.collect = metrics.moments
