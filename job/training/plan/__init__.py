"""How training steps are computed, and why: the load, the candidates, the choice."""
