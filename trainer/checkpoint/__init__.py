"""Checkpoints: one logical format, written so that a crash at any moment leaves the old one or the new one.

contents.py      what a checkpoint holds, as tensors and JSON
files.py         durable writes that hash while they write; reads that check
tensor_file.py   tensors as the bytes of a safetensors file
places.py        folders of this machine and places in object stores, alike for readers
manifest.py      manifest.json and COMMITTED
store.py         saving and loading by the trainer, all ranks together
local_folder.py  publishing on a file system
object_folder.py publishing in an object store
snapshot.py      what a save writes, taken while training goes on
background.py    the thread that writes it, one save at a time
free_space.py    room for checkpoints, asked for before it is used up
file_lock.py     the kernel's lock on a file, with patience for hosts that have gone
ownership.py     whose folder it is, so that two runs never share one
prune.py         which checkpoints are removed, and orphans of a crash
verify.py        checking, naming and pinning checkpoints, for everybody else
load.py          a model from a checkpoint, for evaluation, export and generation
rng.py           states of the random generators
crash_points.py  named places where fault tests end the process
"""
