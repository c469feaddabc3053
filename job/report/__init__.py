"""What people and machines see of a run: events, console, metrics, plots and the model card."""
