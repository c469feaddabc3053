"""What the front door offers beside `run`."""
