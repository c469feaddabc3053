"""The dashboard and the alerts of k8s/monitoring, with a real Prometheus."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.gpus import GpuState
from job.report.metrics import Metrics
from tests.conftest import ROOT, free_port, unavailable

MONITORING = ROOT / "k8s" / "monitoring"
SPEC = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))["spec"]
ALERTS = [rule["alert"] for rule in SPEC["groups"][0]["rules"]]
# What is planted for two hours, a value per minute, and the minute at which the alert fires. Everything else is healthy.
PLANTED: dict[str, tuple[dict[str, str], str]] = {
    "FinetuneStalled": ({"finetune_stalled_seconds": "0+60x120"}, "13m"),
    "FinetuneNoCheckpoint": ({"finetune_checkpoint_age_seconds": "0+60x120"}, "63m"),
    "FinetuneStoreBehind": ({"finetune_upload_lag_seconds": "0+60x120"}, "18m"),
    "FinetuneRestartsOften": ({"finetune_restarts_total": "11x120"}, "1m"),
    "FinetuneLossRises": ({"finetune_loss": "1x20 2x100"}, "35m"),
    "FinetuneSlow": ({"finetune_tokens_per_second": "20000x20 9000x100"}, "35m"),
    "FinetuneGpuIdle": ({'finetune_gpu_utilization_ratio{gpu="0"}': "0.01x120"}, "20m"),
    "FinetuneGpuError": ({'finetune_gpu_xid_errors_total{gpu="0", xid="79"}': "_x30 1x90"}, "35m"),
    "FinetuneUnreachable": ({"up": "1x20 0x100", 'finetune_run_info{run_id="a"}': "1x20 _x100"}, "30m"),
}
HEALTHY = {
    "finetune_stalled_seconds": "3x120",
    "finetune_checkpoint_age_seconds": "300x120",
    "finetune_upload_lag_seconds": "4x120",
    "finetune_restarts_total": "2x120",
    "finetune_loss": "2-0.01x120",
    "finetune_tokens_per_second": "20000x120",
    'finetune_gpu_utilization_ratio{gpu="0"}': "0.97x120",
    'finetune_stage{finetune_stage="train"}': "1x120",
    'finetune_run_info{run_id="a"}': "1x120",
    "up": "1x120",
}


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    if shutil.which("promtool") is None or shutil.which("prometheus") is None:
        unavailable("needs prometheus and promtool: apt-get install prometheus")


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(SPEC), encoding="utf-8")
    return file


def fired(
    folder: Path, series: dict[str, str], alert: str, moment: str, *, fires: bool
) -> subprocess.CompletedProcess[str]:
    """What promtool says of a test that expects this alert, or expects it not to fire."""
    labels = 'instance="10.0.0.7:9400", job="training/finetune"'
    named = {
        f"{name[:-1]}, {labels}}}" if name.endswith("}") else f"{name}{{{labels}}}": values
        for name, values in series.items()
    }
    expected = [{"exp_labels": {"instance": "10.0.0.7:9400"}}] if fires else []
    test = {
        "rule_files": ["rules.yaml"],
        "tests": [{
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in named.items()],
            "alert_rule_test": [{"eval_time": moment, "alertname": alert, "exp_alerts": expected}],
        }],
    }  # fmt: skip
    (folder / "test.yaml").write_text(yaml.safe_dump(test), encoding="utf-8")
    return subprocess.run(
        ["promtool", "test", "rules", "test.yaml"], cwd=folder, capture_output=True, text=True, check=False
    )


def test_every_alert_has_a_planted_cause() -> None:
    assert list(PLANTED) == ALERTS


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_fires_for_its_cause_and_for_no_healthy_run(rules: Path, alert: str) -> None:
    planted, moment = PLANTED[alert]
    assert planted.keys() <= HEALTHY.keys() | {
        'finetune_gpu_xid_errors_total{gpu="0", xid="79"}'
    }  # which begins with one
    found = fired(rules.parent, HEALTHY | planted, alert, moment, fires=True)
    # promtool also compares annotations, which are not repeated here. So it complains, and says which alerts it got
    got = (found.stderr + found.stdout).partition("got:")[2]
    assert f'alertname="{alert}"' in got, found.stderr + found.stdout
    for others in ALERTS:
        if others != alert:
            quiet = fired(rules.parent, HEALTHY | planted, others, moment, fires=False)
            assert quiet.returncode == 0, quiet.stderr + quiet.stdout
    for at in ("1m", moment, "110m"):
        healthy = fired(rules.parent, HEALTHY, alert, at, fires=False)
        assert healthy.returncode == 0, healthy.stderr + healthy.stdout


@pytest.fixture
def prometheus(rules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[Any]]]:
    """A Prometheus that scrapes the metrics of a training, and answers queries."""
    monkeypatch.setattr("job.report.metrics.gpu_states", lambda: {0: GpuState(2**33, 0.97, 640.0)})
    port, own = free_port(), free_port()
    metrics = Metrics("a-run", 60, gpus=2)
    metrics.serve("127.0.0.1", port)
    metrics.attempt(2, last_exit_code=75)
    metrics.gpu_failed(0, 79)
    metrics.stage("train")
    metrics.working(True)
    figures = {
        "loss": 1.5,
        "learning_rate": 1e-4,
        "tokens_per_second": 3000.0,
        "mfu": 0.4,
        "eval_loss": 1.7,
        "grad_norm": 0.5,
        "tokens": 9e6,
    }
    for step in (6, 7):
        metrics.progress("train", {"event": "progress", "done": step, "total": 100, "unit": "steps", **figures})
        time.sleep(0.01)
    metrics.checkpoint_committed(4.0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as scraped:
        linted = subprocess.run(
            ["promtool", "check", "metrics"], input=scraped.read(), capture_output=True, check=False
        )
    assert linted.returncode == 0, linted.stderr.decode()
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "finetune", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
    }
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    checked = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "prometheus.yaml")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    server = subprocess.Popen(
        ["prometheus", f"--config.file={tmp_path / 'prometheus.yaml'}", f"--storage.tsdb.path={tmp_path / 'data'}",
         f"--web.listen-address=127.0.0.1:{own}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def ask(path: str, **named: str) -> Any:
        query = urllib.parse.urlencode(named)
        with urllib.request.urlopen(f"http://127.0.0.1:{own}/api/v1/{path}?{query}", timeout=10) as response:
            return json.load(response)["data"]

    def results(query: str) -> list[Any]:
        found = ask("query", query=query)["result"]
        return list(found) if isinstance(found, list) else [found]

    try:
        for _ in range(200):
            try:
                if results("count_over_time(finetune_loss[1m]) > 2"):
                    break
            except OSError:
                pass
            time.sleep(0.1)
        else:
            pytest.fail("Prometheus scraped nothing")
        rules_found = ask("rules")["groups"][0]["rules"]
        assert [rule["name"] for rule in rules_found if rule["health"] in ("ok", "unknown")] == ALERTS
        yield results
    finally:
        server.terminate()
        server.wait(20)


def test_a_prometheus_answers_every_query_of_the_dashboard(prometheus: Callable[[str], list[Any]]) -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    queries = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) > 15
    for title, query in queries:
        found = prometheus(query.replace("$instance", ".*"))
        assert found, f"{title}: {query} finds nothing"
    assert float(prometheus("finetune_tokens_total")[0]["value"][1]) == 9e6
    assert not prometheus('ALERTS{alertstate="firing"}')


def test_every_series_says_whose_it_is_and_single_values_are_of_this_moment(
    prometheus: Callable[[str], list[Any]],
) -> None:
    """Otherwise two pods have the same name in a legend, and a run shows every stage that it was in today."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        names = []
        for target in panel["targets"]:
            assert bool(target.get("instant")) == (panel["type"] == "stat"), panel["title"]
            for series in prometheus(target["expr"].replace("$instance", ".*")):
                for pod in ("a", "b"):
                    name = target["legendFormat"]
                    for label, value in {**series["metric"], "instance": pod}.items():
                        name = name.replace(f"{{{{{label}}}}}", value)
                    names.append(name)
        assert names and len(set(names)) == len(names), (panel["title"], names)


def test_panels_do_not_overlap_and_every_metric_is_on_the_dashboard(prometheus: Callable[[str], list[Any]]) -> None:
    text = (MONITORING / "dashboard.json").read_text(encoding="utf-8")
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(text)["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    names = {one["metric"]["__name__"] for one in prometheus('{__name__=~"finetune_.*"}')}
    shown = {name for name in names if name in text}
    assert {name for name in names - shown if not name.endswith("_created")} == set()
