"""Several machines that train together: who is there, when to start, and who is gone."""
