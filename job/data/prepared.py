"""Prepared rows on disk, as the datasets library loads them: one Arrow file, written in pieces."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

from job.data import packing
from job.data.report import labels_of

_FILE = "data-00000-of-00001.arrow"


class RowWriter:
    """Takes documents in order and writes them as rows with `input_ids` and `labels`.

    With `packed`, several documents share a row of at most `max_length` tokens, and `seq_lengths` tell the collator where
    each starts. Positions restart there, and attention does not cross.
    """

    def __init__(self, stream: pa.RecordBatchStreamWriter, *, packed: bool, max_length: int) -> None:
        self._stream, self._packed, self._max_length = stream, packed, max_length
        self._ids: list[np.ndarray[Any, Any]] = []
        self._labels: list[np.ndarray[Any, Any]] = []
        self._lengths: list[int] = []
        self.rows = 0

    def add(self, ids: np.ndarray[Any, Any], learned: np.ndarray[Any, Any], starts: np.ndarray[Any, Any]) -> None:
        """Documents one after another; `starts` are their offsets, and the end of the last one."""
        labels, edges = labels_of(ids, learned), starts.tolist()
        for first, last in itertools.pairwise(edges):
            self._ids.append(ids[first:last])
            self._labels.append(labels[first:last])
            self._lengths.append(last - first)
            if len(self._lengths) == packing.TOGETHER:
                self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if not self._lengths:
            return
        lengths = np.array(self._lengths, np.int64)
        groups = packing.bins(lengths, self._max_length) if self._packed else [[index] for index in range(len(lengths))]
        order = [index for group in groups for index in group]
        ends = np.cumsum([0, *(int(lengths[group].sum()) for group in groups)]).astype(np.int32)
        columns = [
            pa.ListArray.from_arrays(ends, np.concatenate([parts[index] for index in order]))
            for parts in (self._ids, self._labels)
        ]
        if self._packed:
            counts = np.cumsum([0, *map(len, groups)]).astype(np.int32)
            columns.append(pa.ListArray.from_arrays(counts, lengths[order].astype(np.int32)))
        schema = _schema(packed=self._packed)
        self._stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        self.rows += len(groups)
        self._ids, self._labels, self._lengths = [], [], []


@contextmanager
def writing(folder: Path, *, packed: bool, max_length: int) -> Iterator[RowWriter]:
    """A writer of `folder`, which `datasets.load_from_disk` reads afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = _schema(packed=packed)
    with pa.OSFile(str(folder / _FILE), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        writer = RowWriter(stream, packed=packed, max_length=max_length)
        yield writer
        writer.flush()
    state: dict[str, Any] = {
        "_data_files": [{"filename": _FILE}],
        "_fingerprint": "prepared",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    info = {"features": _features(packed=packed).to_dict()}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")


def _features(*, packed: bool) -> Features:
    names = ("input_ids", "labels", *(("seq_lengths",) if packed else ()))
    return Features({name: List(Value("int32")) for name in names})


def _schema(*, packed: bool) -> pa.Schema:
    schema: pa.Schema = _features(packed=packed).arrow_schema
    return schema
