"""Checkpoints: one logical format, written so that a crash at any moment leaves the old one or the new one.

contents.py      what a checkpoint holds, as tensors and JSON
files.py         durable writes that hash while they write; reads that check
manifest.py      manifest.json and COMMITTED
store.py         saving and loading by the trainer, all ranks together
prune.py         which checkpoints are removed, and orphans of a crash
verify.py        checking, naming and pinning checkpoints, for everybody else
load.py          a model from a checkpoint, for evaluation, export and generation
rng.py           states of the random generators
crash_points.py  named places where fault tests end the process
"""
