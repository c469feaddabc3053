"""Compiled kernels in the store."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.checkpoints.kernels import CompiledKernels, _unpack
from job.errors import InputError
from job.run import Run
from tests.conftest import ROOT

_COMPILE = """
from job.training.adamw_kernel import _adamw_kernel
from tests.model.hopper import compiled
kernel = compiled(_adamw_kernel, {}, {"BLOCK": 1024}, 4)
print(len(kernel.asm["cubin"]), sorted(kernel.asm))
"""


@pytest.fixture
def machine(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, CompiledKernels]]:
    """Another machine of the same run: its cache folder and its `CompiledKernels`."""

    def make(name: str, said: list[str] | None = None) -> tuple[Path, CompiledKernels]:
        folder = tmp_path / name / "triton"
        monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
        told = [] if said is None else said
        return folder, CompiledKernels(
            make_run(STORE_URL=str(tmp_path / "store")), lambda text, level: told.append(f"{level}: {text}")
        )

    return make


def compile_one(folder: Path) -> str:
    """Compile a kernel for an H100 without having one. Returns what this machine did."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], cwd=ROOT, env={**environment, "TRITON_CACHE_DIR": str(folder)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_a_kernel_compiled_on_one_machine_is_not_compiled_again_on_the_next(
    machine: Callable[..., tuple[Path, CompiledKernels]],
) -> None:
    first, kernels = machine("first")
    made = compile_one(first)
    kernels.keep()
    second, kernels = machine("second")
    kernels.fetch()
    there = {path.relative_to(second): path.stat().st_mtime_ns for path in second.rglob("*") if path.is_file()}
    assert {path.suffix for path in there} == {".cubin", ".json"}
    found = compile_one(second)
    assert found.split()[0] == made.split()[0]
    assert "'ptx'" in made
    assert "'ptx'" not in found, "it was compiled again"
    assert {path.relative_to(second): path.stat().st_mtime_ns for path in second.rglob("*") if path.is_file()} == there


def make_kernel(folder: Path, name: str) -> Path:
    kernel = folder / name.ljust(52, "A")
    kernel.mkdir(parents=True)
    files = {f"_{name}.{kind}": str(kernel / f"_{name}.{kind}") for kind in ("cubin", "json", "ptx")}
    (kernel / f"_{name}.cubin").write_bytes(name.encode())
    (kernel / f"_{name}.json").write_text("{}", encoding="utf-8")
    (kernel / f"_{name}.ptx").write_text("text", encoding="utf-8")
    (kernel / "launcher.so").write_bytes(b"code of the host's")
    (kernel / f"__grp___{name}.json").write_text(json.dumps({"child_paths": files}), encoding="utf-8")
    return kernel


def test_only_new_kernels_are_stored_and_only_missing_ones_are_fetched(
    machine: Callable[..., tuple[Path, CompiledKernels]],
) -> None:
    said: list[str] = []
    folder, kernels = machine("first", said)
    kernels.fetch()
    kernels.keep()
    assert said == []  # nothing is cached and nothing is stored
    make_kernel(folder, "norm")
    for _ in range(2):
        kernels.keep()
    make_kernel(folder, "gate")
    kernels.keep()
    assert said == ["debug: Stored 1 compiled kernels.", "debug: Stored 2 compiled kernels."]
    said.clear()
    folder, kernels = machine("second", said)
    own = make_kernel(folder, "norm")
    kernels.fetch()
    kernels.keep()
    assert said == ["debug: Fetched 1 compiled kernels from the store."]
    assert (own / "launcher.so").exists()
    gate = folder / "gate".ljust(52, "A")
    assert sorted(path.name for path in gate.iterdir()) == ["__grp___gate.json", "_gate.cubin", "_gate.json"]
    listed = json.loads((gate / "__grp___gate.json").read_text(encoding="utf-8"))["child_paths"]
    assert listed == {name: str(gate / name) for name in ("_gate.cubin", "_gate.json")}
    assert not list(folder.glob("*.partial-*"))


entry_names = st.one_of(
    st.text(max_size=60),
    st.sampled_from(["A" * 20 + "/x.cubin", "A" * 20 + "/__grp__x.json", "../" + "A" * 20 + "/x.json"]),
)
entry_types = st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
entries = st.tuples(entry_names, entry_types, st.text(max_size=20), st.binary(max_size=40))
damages = st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), max_size=4)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(st.lists(entries, max_size=3), st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), damages)
def test_an_archive_is_refused_or_holds_kernel_files_alone(
    contents: list[tuple[str, bytes, str, bytes]], form: int, damage: list[tuple[int, int]]
) -> None:
    buffer = io.BytesIO()
    try:
        with tarfile.open(fileobj=buffer, mode="w:", format=form) as archive:
            for name, kind, target, data in contents:
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname, entry.size = kind, target, len(data) if kind == tarfile.REGTYPE else 0
                archive.addfile(entry, io.BytesIO(data))
    except ValueError:  # a name that no archive can hold
        return
    plain = bytearray(buffer.getvalue())
    for place, byte in damage:
        plain[place % len(plain)] = byte
    try:
        kernels = _unpack(gzip.compress(plain, compresslevel=0))
    except ValueError:
        return
    names = [f"{folder}/{file}" for folder, files in kernels.items() for file in files]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{16,}/[^/\0]+\.(cubin|json)", name) for name in names)
    assert sum(len(data) for files in kernels.values() for data in files.values()) <= len(plain)


@pytest.mark.parametrize("sparse", ["old", "pax"])
def test_an_entry_that_grows_when_it_is_read_is_refused(sparse: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        entry = tarfile.TarInfo("A" * 20 + "/x.cubin")
        if sparse == "pax":
            entry.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**42), "GNU.sparse.numblocks": "1"}
        archive.addfile(entry)
    plain = bytearray(buffer.getvalue())
    if sparse == "old":
        plain[156:157] = tarfile.GNUTYPE_SPARSE
        plain[386:410] = b"00000000000\0" * 2  # the first block: no byte, at offset 0
        plain[483:495] = b"37777777777\0"  # the size once it is read: 4 GiB
        plain[148:156] = b" " * 8
        plain[148:156] = b"%06o\0 " % sum(plain[:512])
    with pytest.raises(ValueError, match="is not a kernel file"):
        _unpack(gzip.compress(plain))


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[: len(packed) // 2],
        lambda packed: b"no archive",
        lambda packed: packed[:-9] + b"123456789",
    ],
)
def test_a_kernel_damaged_in_the_store_is_compiled_again(
    machine: Callable[..., tuple[Path, CompiledKernels]], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    folder, kernels = machine("first")
    make_kernel(folder, "norm")
    kernels.keep()
    (stored,) = (tmp_path / "store").rglob("kernels.tar.gz")
    stored.write_bytes(damage(stored.read_bytes()))
    said: list[str] = []
    folder, kernels = machine("second", said)
    kernels.fetch()
    assert len(said) == 1
    assert said[0].startswith("warning: Not using the compiled kernels in the store: ")
    assert not list(folder.glob("*"))
    make_kernel(folder, "norm")
    kernels.keep()
    assert said[1:] == ["debug: Stored 1 compiled kernels."]


def test_stored_kernels_are_not_read_again_after_every_checkpoint(
    machine: Callable[..., tuple[Path, CompiledKernels]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kernels = machine("first")
    make_kernel(folder, "norm")
    (folder / "driver".ljust(52, "A")).mkdir()  # holds only host code
    kernels.keep()
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read again"))
    kernels.keep()


def test_a_file_list_in_an_unknown_format_stores_nothing_and_stops_nothing(
    machine: Callable[..., tuple[Path, CompiledKernels]], tmp_path: Path
) -> None:
    said: list[str] = []
    folder, kernels = machine("first", said)
    (make_kernel(folder, "norm") / "__grp___norm.json").write_text('["_norm.cubin"]', encoding="utf-8")
    kernels.keep()
    assert len(said) == 1
    assert said[0].startswith("warning: The compiled kernels were not stored: ")
    assert not list((tmp_path / "store").rglob("kernels.tar.gz"))


def list_archive(archive: Path) -> None:
    """As whoever may write the archive may do too."""
    data = archive.read_bytes()
    listing = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "kernels": []}
    archive.with_name("kernels.json").write_text(json.dumps(listing), encoding="utf-8")


@pytest.mark.parametrize(
    "attack", ["link", "zeros", "truncated", "not an archive", "deep listing", "no listing", "device"]
)
def test_nothing_in_the_store_about_kernels_ends_a_run(
    machine: Callable[..., tuple[Path, CompiledKernels]], tmp_path: Path, attack: str
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo(f"{'a' * 20}/_norm.cubin")
        if attack == "link":
            entry.type, entry.linkname = tarfile.SYMTYPE, "nowhere"
        if attack == "device":
            entry.type = tarfile.CHRTYPE
        entry.size = 200 << 20 if attack == "zeros" else 0
        archive.addfile(entry, io.BytesIO(bytes(entry.size)))
    data = {"truncated": buffer.getvalue()[:-9], "not an archive": b"x" * 100}.get(attack, buffer.getvalue())
    said: list[str] = []
    _, kernels = machine("first", said)
    target = tmp_path / "store" / "here" / "kernels.tar.gz"
    target.parent.mkdir(parents=True)
    target.write_bytes(data)
    if attack != "no listing":
        list_archive(target)
    if attack == "deep listing":
        target.with_name("kernels.json").write_text("[" * 100_000, encoding="utf-8")
    kernels.fetch()
    assert "Not using the compiled kernels in the store" in said[0]


def test_an_object_too_large_to_be_a_record_is_not_read(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(STORE_URL=str(tmp_path / "store"))
    (tmp_path / "store/here").mkdir(parents=True)
    with (tmp_path / "store/here/run.json").open("wb") as stream:
        stream.truncate(3 << 30)
    with pytest.raises(InputError, match="the job's own records are small"):
        run.store.get("here/run.json")


def test_one_setting_leaves_the_stores_kernels_out(make_run: Callable[..., Run]) -> None:
    said: list[str] = []
    run = make_run(KEEP_KERNELS="false")
    run.store.put("here/kernels.tar.gz", b"anything")
    CompiledKernels(run, lambda text, level: said.append(text)).fetch()
    assert said == []


def test_an_archive_with_paths_outside_the_cache_is_refused(
    machine: Callable[..., tuple[Path, CompiledKernels]], tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("../../evil/_norm.cubin")
        archive.addfile(entry, io.BytesIO())
    said: list[str] = []
    _, kernels = machine("first", said)
    target = tmp_path / "store" / "here" / "kernels.tar.gz"
    target.parent.mkdir(parents=True)
    target.write_bytes(buffer.getvalue())
    list_archive(target)
    kernels.fetch()
    assert "is not a kernel file" in said[0]
    assert not (tmp_path / "evil").exists()
