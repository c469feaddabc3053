"""The parent process: it starts the stages, passes on stop requests, stores results and decides the exit code."""
