"""The default recipe still gives the losses that it gave."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import STEPS, machine, recorded, run


def test_the_default_recipe_gives_the_recorded_losses(tmp_path: Path) -> None:
    """To the bit on the machine type that recorded them, and within rounding elsewhere."""
    found, wanted = run(tmp_path), recorded()
    assert len(found["losses"]) == len(wanted["losses"]) == STEPS
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    if wanted["machine"] == machine():
        assert found["losses"] == wanted["losses"]
        assert found["adapter_sha256"] == wanted["adapter_sha256"]
