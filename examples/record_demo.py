"""Records the demo's picture for the README: `make picture`.

Runs the job as `make demo` does, in text, and draws what it printed as an SVG of a terminal. The loss curve that it
published is copied beside it.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from dotenv import dotenv_values
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
_WIDTH = 104
_STYLES = (
    (r"^\$ .*", "bold green"), (r"^▸ .*", "bold"), (r"^    before:.*(\n      .*)*", "dim"), (r"^    after:.*(\n      .*)*", "green"),
    (r"^Run .* is complete\.$", "bold"), (r"^\w+ +done +[\d.]+ s$", "cyan"),
)  # fmt: skip


def main() -> None:
    """Run the demo and draw it."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = {name: str(value) for name, value in dotenv_values(ROOT / "examples" / "demo.env").items()}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FT_")}
        environment |= settings | {"FT_LOG_FORMAT": "text", "FT_OUTPUT_DIR": scratch, "FT_RUN_ID": "lighthouse"}
        done = subprocess.run(
            [sys.executable, str(ROOT / "entrypoint.py")], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )  # fmt: skip
        IMAGES.mkdir(exist_ok=True)
        shutil.copy(next(Path(scratch).glob("published/*/loss_curve.png")), IMAGES / "loss_curve.png")
        draw(
            "$ make demo\n" + done.stdout.replace(f"{scratch}/", "results/").replace(f"{ROOT}/", ""),
            IMAGES / "demo.svg",
        )


def draw(output: str, file: Path) -> None:
    """The terminal as an SVG; lines that only count progress are left out."""
    lines = [line for line in output.splitlines() if not re.match(r"^\s+[\d.,]+/[\d.,]+ ", line)]
    text = Text("\n".join(_folded(line) for line in lines))
    for pattern, style in _STYLES:
        text.highlight_regex(re.compile(pattern, re.MULTILINE), style)
    console = Console(record=True, width=_WIDTH, file=io.StringIO())
    console.print(text, soft_wrap=True)
    console.save_svg(str(file), title="make demo")


def _folded(line: str) -> str:
    """Long answers on several lines, as a terminal shows them."""
    if len(line) <= _WIDTH:
        return line
    return textwrap.fill(line, _WIDTH, subsequent_indent=" " * 6, drop_whitespace=True)


if __name__ == "__main__":
    main()
