"""The fine-tuning job: nine stages that turn a base model and a dataset into a published model."""

__version__ = "0.2.0"
