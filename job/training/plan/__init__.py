"""The plan of how training steps are computed: the load, the candidates, and the choice among them."""
