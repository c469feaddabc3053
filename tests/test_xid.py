"""What the driver reports of a GPU's errors reaches the log and the metrics."""

from __future__ import annotations

import ctypes
import io
import json
import queue
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from job.gpus import watch_for_xids
from job.report.console import open_console
from job.supervision.journal import Journal

_TIMEOUT, _NOT_SUPPORTED, _GPU_IS_LOST = 10, 3, 15  # nvmlReturn_t


class Driver:
    """Functions with the signatures of nvml.h, called through pynvml, for two GPUs. `errors` holds (gpu, xid) or a result."""

    def __init__(self) -> None:
        self.errors: queue.Queue[tuple[int, int] | int] = queue.Queue()
        self.unsupported: set[int] = set()
        self.registered: list[tuple[int, int]] = []
        self.ended = threading.Event()
        pointer, number = ctypes.c_void_p, ctypes.c_uint
        self.library = SimpleNamespace(
            nvmlInitWithFlags=ctypes.CFUNCTYPE(number, number)(lambda flags: 0),
            nvmlShutdown=ctypes.CFUNCTYPE(number)(self._shutdown),
            nvmlDeviceGetCount_v2=ctypes.CFUNCTYPE(number, pointer)(self._count),
            nvmlDeviceGetHandleByIndex_v2=ctypes.CFUNCTYPE(number, number, pointer)(self._handle),
            nvmlDeviceGetIndex=ctypes.CFUNCTYPE(number, pointer, pointer)(self._index),
            nvmlEventSetCreate=ctypes.CFUNCTYPE(number, pointer)(self._create),
            nvmlDeviceRegisterEvents=ctypes.CFUNCTYPE(number, pointer, ctypes.c_ulonglong, pointer)(self._register),
            nvmlEventSetWait_v2=ctypes.CFUNCTYPE(number, pointer, pointer, number)(self._wait),
        )

    def _shutdown(self) -> int:
        self.ended.set()
        return 0

    def _count(self, found: int) -> int:
        ctypes.c_uint.from_address(found).value = 2
        return 0

    def _handle(self, index: int, handle: int) -> int:
        ctypes.c_void_p.from_address(handle).value = 1000 + index
        return 0

    def _index(self, handle: int, index: int) -> int:
        ctypes.c_uint.from_address(index).value = handle - 1000
        return 0

    def _create(self, events: int) -> int:
        ctypes.c_void_p.from_address(events).value = 7
        return 0

    def _register(self, handle: int, kinds: int, events: int) -> int:
        if events != 7 or handle - 1000 in self.unsupported:
            return _NOT_SUPPORTED
        self.registered.append((handle - 1000, kinds))
        return 0

    def _wait(self, events: int, data: int, milliseconds: int) -> int:
        if events != 7 or milliseconds < 1000:
            return _NOT_SUPPORTED
        found = self.errors.get(timeout=30)
        if isinstance(found, int):
            return found
        event = pynvml.c_nvmlEventData_t.from_address(data)
        ctypes.c_void_p.from_buffer(event).value = 1000 + found[0]  # its first member is the device
        event.eventType, event.eventData = pynvml.nvmlEventTypeXidCriticalError, found[1]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    monkeypatch.setattr(pynvml, "nvmlLib", driver.library)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield driver
    driver.errors.put(_GPU_IS_LOST)
    assert driver.ended.wait(10)


def test_every_error_of_a_gpu_is_told_with_its_number(driver: Driver) -> None:
    told: queue.Queue[tuple[int, int]] = queue.Queue()
    watch_for_xids(lambda gpu, xid: told.put((gpu, xid)))
    driver.errors.put((1, 79))
    driver.errors.put(_TIMEOUT)  # a quiet minute
    driver.errors.put((0, 31))
    assert [told.get(timeout=10), told.get(timeout=10)] == [(1, 79), (0, 31)]
    assert driver.registered == [(0, 8), (1, 8)]  # nvmlEventTypeXidCriticalError


def test_a_card_that_reports_no_events_does_not_hide_another_s(driver: Driver) -> None:
    driver.unsupported = {0}
    told: queue.Queue[tuple[int, int]] = queue.Queue()
    watch_for_xids(lambda gpu, xid: told.put((gpu, xid)))
    driver.errors.put((1, 48))
    assert told.get(timeout=10) == (1, 48)


def test_only_the_cards_of_this_job_are_watched(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda card: f"GPU-{id(card)}")
    told: queue.Queue[tuple[int, int]] = queue.Queue()
    watch_for_xids(lambda gpu, xid: told.put((gpu, xid)))
    driver.errors.put((1, 94))
    assert told.get(timeout=10) == (1, 94)
    assert driver.registered == [(1, 8)]


def test_an_error_that_the_driver_repeats_is_quoted_once_and_counted_each_time(
    driver: Driver, make_run: Callable[..., Any]
) -> None:
    log, run = io.StringIO(), make_run()
    journal = Journal(run, open_console("json", "info", run.id, log))
    told: queue.Queue[None] = queue.Queue()

    def tell(gpu: int, xid: int) -> None:
        journal.gpu_failed(gpu, xid)
        told.put(None)

    watch_for_xids(tell)
    for _ in range(3):
        driver.errors.put((1, 31))
        told.get(timeout=10)
    (line,) = [json.loads(line) for line in log.getvalue().splitlines()]
    assert line["level"] == "warning" and "Xid 31 of GPU 1" in line["message"]
    labels = {"gpu": "1", "xid": "31"}
    assert journal.metrics._registry.get_sample_value("finetune_gpu_xid_errors_total", labels) == 3
