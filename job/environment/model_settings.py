"""Settings that do not go together with the chosen model, as its config.json shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.errors import SettingsError
from job.settings import Settings


def refuse_unfit(settings: Settings, config: Mapping[str, Any]) -> None:
    """Raise SettingsError if the model cannot be trained with these settings."""
    named = settings.modules_to_save
    if config.get("tie_word_embeddings") and "lm_head" in named and "embed_tokens" not in named:
        raise SettingsError(
            "FT_MODULES_TO_SAVE names lm_head, which is the same matrix as embed_tokens in this model.",
            "Name embed_tokens too: it is trained once, for both.",
        )
