"""TRL's trainer, with one fault of resuming mended."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer


class AdapterTrainer(SFTTrainer):
    """SFTTrainer whose adapter goes on in the type in which it began.

    peft loads a checkpoint's adapter as float32, whatever it was saved in, and the optimizer's state follows the type of
    the parameters: a run in bfloat16 would go on in other numbers than it began with.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trained = self.model if model is None else model
        before = {name: value.dtype for name, value in trained.named_parameters() if value.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(before[name])
