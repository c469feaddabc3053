"""The parent process: it starts the stages, passes stop requests on, stores what they make, and decides the exit code."""
