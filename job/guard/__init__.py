"""What comes from outside is only data: names, limits, secrets and text, each made safe in one place."""
