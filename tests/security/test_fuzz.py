"""Small inputs, mutated thousands of times, through download and prepare: each ends 0, 65 or 78, and in time."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import LIGHTHOUSE

INPUTS, SECONDS = 1000, 60
ALLOWED = {0, 65, 78, -signal.SIGVTALRM, -signal.SIGSEGV}  # of the last two the supervisor makes 65

JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**70, 1e308, -0.5, "", "many", "../../etc/passwd", "evil/kernel", "\x1e{}", "\ud800", [], {}, [[]] * 50, {"a": {"a": []}},
    "<s>", "{{ x }}", list(range(500)), "x" * 5000,
)  # fmt: skip
TEMPLATES = (
    "{{ messages }}", "{% for m in messages %}{{ m.role }}{{ m['content'] }}{% endfor %}", "{{ 1/0 }}", "{% if %}", "{{ messages[9] }}",
    "{{ bos_token * 10 }}", "{{ raise_exception('no') }}", "{% set x = namespace(y=1) %}{{ x.y }}", "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}", "{% for i in range(200000) %}x{% endfor %}", "{{ messages | tojson }}", "{{ strftime_now('%Y') }}",
)  # fmt: skip


def mutate_json(value: Any, chance: random.Random) -> Any:
    """Change one place of a JSON value."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        name = chance.choice(list(value))
        if chance.random() < 0.15:
            return {key: item for key, item in value.items() if key != name}
        return {**value, name: mutate_json(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        return [*value[:place], mutate_json(value[place], chance), *value[place + 1 :]]
    return chance.choice(VALUES)


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    kind = chance.randrange(4)
    if kind == 0:
        return data[: chance.randrange(len(data) + 1)]
    if kind == 1:
        place = chance.randrange(len(data) + 1)
        return (
            data[:place]
            + chance.choice([b"\x00", b"\xff\xfe", b"{", b"[" * 3000, b'"', b"\r", b"NaN", b"\xef\xbb\xbf"])
            + data[place:]
        )
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 8)):
        if changed:
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def spoil(model: Path, data: Path, chance: random.Random) -> str:
    """Mutate one file; returns which, and how."""
    kind = chance.choice(
        ["json", "json", "json", "bytes", "template", "rows", "rows", "row bytes", "other data", "card", "weights"]
    )
    if kind == "json":
        file = model / chance.choice(JSON_FILES)
        file.write_text(json.dumps(mutate_json(json.loads(file.read_text("utf-8")), chance)), encoding="utf-8")
        return f"{kind} {file.name}"
    if kind in ("bytes", "weights"):
        file = model / ("model.safetensors" if kind == "weights" else chance.choice(JSON_FILES))
        file.write_bytes(mutate_bytes(file.read_bytes(), chance))
        return f"{kind} {file.name}"
    if kind == "template":
        file = model / "tokenizer_config.json"
        config = json.loads(file.read_text("utf-8"))
        file.write_text(json.dumps(config | {"chat_template": chance.choice(TEMPLATES)}), encoding="utf-8")
        return kind
    rows = data / "rows.jsonl"
    if kind == "rows":
        lines = rows.read_text("utf-8").splitlines()
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(lines))
            lines[place] = json.dumps(mutate_json(json.loads(lines[place]), chance))
        rows.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    elif kind == "row bytes":
        rows.write_bytes(mutate_bytes(rows.read_bytes(), chance))
    elif kind == "other data":
        content = mutate_bytes(rows.read_bytes(), chance)
        rows.unlink()
        (
            data / chance.choice(["rows.parquet", "rows.csv", "rows.arrow", "rows.jsonl.gz", "rows.json", "rows.txt"])
        ).write_bytes(content)
    else:
        card = {
            "configs": [
                mutate_json({"config_name": "default", "data_files": [{"split": "train", "path": "rows*"}]}, chance)
            ]
        }
        text = f"---\n{json.dumps(card)}\n---\n".encode()
        (data / "README.md").write_bytes(mutate_bytes(text, chance) if chance.random() < 0.5 else text)
        shutil.copy(rows, data / "more.jsonl")
    return kind


def outcome(folder: Path, model: Path, data: Path) -> int:
    """How download and prepare end on these inputs, in a fork that has seconds to do it."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = _in_the_fork(folder, model, data)
        finally:
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGKILL


def _in_the_fork(folder: Path, model: Path, data: Path) -> int:
    from job.environment import load_settings
    from job.run import Run
    from job.stages.__main__ import _as_job_error
    from job.stages.download import download
    from job.stages.prepare import prepare

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", errors="replace"), os.fdopen(2, "w", errors="replace")
    os.environ |= {
        "FT_MODEL_NAME": str(model), "FT_DATASET_NAME": str(data), "FT_DEVICE": "cpu", "FT_OUTPUT_DIR": str(folder / "out"), "FT_RUN_ID": "fuzz",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    try:
        run = Run.of(load_settings())
        download(run)
        prepare(run)
    except BaseException as error:
        known = _as_job_error(error)
        if known is None:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        return int(known.exit_code) if known is not None else 70
    return 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_mutated_input_ends_as_an_input_or_a_setting_that_is_wrong(
    tiny_model: Path, tmp_path: Path, seed: int
) -> None:
    import job.stages.download
    import job.stages.prepare  # noqa: F401 (so that the forks need not)

    rows = LIGHTHOUSE.read_text(encoding="utf-8").splitlines()[:12]
    ends: Counter[int] = Counter()
    for number in range(INPUTS):
        chance = random.Random(seed * 100_000 + number)
        folder = tmp_path / str(number)
        model, data = folder / "model", folder / "data"
        shutil.copytree(tiny_model, model)
        data.mkdir()
        (data / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        how = spoil(model, data, chance)
        code = outcome(folder, model, data)
        ends[code] += 1
        log = (folder / "log").read_text("utf-8", errors="replace") if (folder / "log").exists() else ""
        assert code in ALLOWED, f"input {seed * 100_000 + number} ({how}) ended {code}: {log[-3000:]}"
        shutil.rmtree(folder)
    assert ends[0] > 100 and ends[65] > 100, ends
