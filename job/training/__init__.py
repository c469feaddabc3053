"""TRL's SFTTrainer and the few callbacks that tie it to the job."""
