"""Command line, run loop, engine, checkpoints, tracking, evaluation and reports."""
