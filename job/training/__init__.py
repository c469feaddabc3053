"""TRL's SFTTrainer, and what ties it to the job: plans, checkpoints, callbacks."""
