"""What people and machines see of a run: events, the console, plots, the model card."""
