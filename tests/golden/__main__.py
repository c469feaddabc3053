"""Writes the golden losses: `python -m tests.golden [ROOT]`, with the code below ROOT."""

import json
import sys
import tempfile
from pathlib import Path

from tests.golden import FILE, ROOT, run

with tempfile.TemporaryDirectory() as scratch:
    found = run(Path(scratch), Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
