"""What happened over all runs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What happened over all runs. `over()` after enough kills, when time is up, or when something went wrong."""

    wanted: int
    until: float
    kills: Counter[str] = field(default_factory=Counter)
    by_scenario: dict[str, Counter[str]] = field(default_factory=dict)
    resumes: int = 0
    lost_steps: dict[str, int] = field(default_factory=dict)  # the worst of each scenario
    damaged_commits: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    hangs: int = 0
    complaints: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def over(self) -> bool:
        return sum(self.kills.values()) >= self.wanted or time.monotonic() > self.until or len(self.complaints) > 5

    def count(self, scenario: str, what: str, number: int = 1) -> None:
        with self.lock:
            self.by_scenario.setdefault(scenario, Counter())[what] += number

    def killed(self, scenario: str, where: str) -> None:
        with self.lock:
            self.kills[where] += 1
            self.by_scenario.setdefault(scenario, Counter())["disturbed"] += 1

    def resumed(self, scenario: str, lost: int) -> None:
        with self.lock:
            self.resumes += 1
            self.lost_steps[scenario] = max(self.lost_steps.get(scenario, 0), lost)

    def complain(self, text: str) -> None:
        with self.lock:
            self.complaints.append(text)


def report(tally: Tally, seed: int, seconds: float) -> int:
    """Print the tables and the closing line. Returns the exit code."""
    for name, count in sorted(tally.kills.items()):
        print(f"  {name}: {count}")
    for name, count in sorted(tally.faults.items()):
        print(f"  fault of the store's network, {name}: {count}")
    print("| scenario | runs | kills and stops | ended by faults | equal | most steps lost |")
    print("|---|---|---|---|---|---|")
    for name, counts in tally.by_scenario.items():
        columns = (counts["runs"], counts["disturbed"], counts["ended"], counts["equal"], tally.lost_steps.get(name, 0))
        print(f"| {name} | {' | '.join(map(str, columns))} |")
    print("\n".join(tally.complaints))
    runs = sum(counts["runs"] for counts in tally.by_scenario.values())
    equal = sum(counts["equal"] for counts in tally.by_scenario.values())
    ended = sum(counts["ended"] for counts in tally.by_scenario.values())
    good = equal == runs and not tally.complaints
    print(
        f"seed {seed}: {sum(tally.kills.values())} kills in {runs} runs, {tally.resumes} resumes, "
        f"{sum(tally.faults.values())} faults of the network, {ended} starts ended by faults, "
        f"{tally.damaged_commits} corrupt checkpoints, {tally.hangs} hangs, "
        f"final hashes equal in {equal} of {runs} runs, {seconds:.0f} s: {'PASSED' if good else 'FAILED'}"
    )
    return 0 if good else 1
