"""One file a command: `run(args) -> dict`."""
