"""The Long Range Arena's files as documents: one sample = the input, a line end, the label, a line end.

Read without TensorFlow and without pickle:

- listops: `basic_{train,val,test}.tsv`, columns Source and Target; the brackets `( )`, which its authors drop too, are
  left out.
- text: the folders `{train,test}/{neg,pos}` of aclImdb; label 0 or 1.
- retrieval: `new_aan_pairs.{train,eval,test}.tsv`: label, two ids, two texts; the texts stand on a line each.
- image: the binary version of CIFAR-10 (1 + 3,072 bytes a sample), made grey; 32 lines of 32 pixels.
- pathfinder: `metadata/*.npy` (lines of text in spite of their name) and the PNG files that they list; pixels as above.

A pixel is two hexadecimal digits, so that documents are text and nothing is lost. Some tasks are also published as
pickles, which are never read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longspan.data_pipeline.regular_files import read_regular
from longspan.data_pipeline.source_config import LongRangeArenaConfig
from longspan.data_pipeline.sources.archives import archive_files, matches
from longspan.data_pipeline.sources.grouping import natural
from longspan.data_pipeline.sources.places import find_places, local_file
from longspan.data_pipeline.sources.tally import Tally
from longspan.data_pipeline.sources.text import SourceDocument, SourceText
from longspan.errors import UsageError

_SIDE = 32  # pixels of a CIFAR-10 image
_RECORD = 1 + 3 * _SIDE * _SIDE
_GREY = np.array([0.2989, 0.587, 0.114])  # weights of red, green and blue that the Arena's own pipeline uses
_SPLITS = {
    "listops": {"train": "*basic_train.tsv", "validation": "*basic_val.tsv", "test": "*basic_test.tsv"},
    "text": {"train": "*train/[np]??/*.txt", "test": "*test/[np]??/*.txt"},
    "retrieval": {
        "train": "*new_aan_pairs.train.tsv",
        "validation": "*new_aan_pairs.eval.tsv",
        "test": "*new_aan_pairs.test.tsv",
    },
    "image": {"train": "*data_batch_?.bin", "test": "*test_batch.bin"},
    "pathfinder": {"train": "*metadata/*.npy", "validation": "*metadata/*.npy", "test": "*metadata/*.npy"},
}
_LABELS = ("0", "1", "0.0", "1.0")  # of retrieval pairs
# Of ten samples as listed eight train, one validates, one tests. The Arena's own 80, 10 and 10 percent are of an order
# that TensorFlow shuffles, which nothing else can repeat.
_PATHFINDER_PARTS = {"train": range(8), "validation": range(8, 9), "test": range(9, 10)}


def read_long_range_arena(config: LongRangeArenaConfig) -> SourceText:
    """The samples of one split as documents, in order of file and line.

    Raises:
        UsageError: the files are missing or not in the form above, or the task has no such split.
    """
    pattern = _SPLITS[config.task].get(config.split)
    if pattern is None:
        raise UsageError(
            f"source {config.name}: the task {config.task} has no split {config.split}. "
            f"Allowed: {', '.join(_SPLITS[config.task])}."
        )
    if not Path(config.path).expanduser().is_dir():
        find_places(config.name, [config.path])  # an archive or URL; a wrong path is told here
    tally = Tally(config.name)
    readers = {
        "listops": _listops,
        "text": _reviews,
        "retrieval": _pairs,
        "image": _images,
        "pathfinder": _pathfinder,
    }
    documents = readers[config.task](config, pattern, tally)
    return SourceText(documents, f"Long Range Arena, {config.task}, {config.split}", tally)


def _files(config: LongRangeArenaConfig, pattern: str, tally: Tally) -> Iterator[tuple[str, bytes]]:
    """Path and content of the files that match, from a folder or an archive."""
    found = False
    root = Path(config.path).expanduser()
    if root.is_dir():
        names = (file.relative_to(root).as_posix() for file in root.rglob("*") if not file.is_symlink())
        for name in sorted((name for name in names if matches(f"/{name}", (pattern,))), key=natural):
            found = True
            yield name, read_regular(root / name)
    else:
        for place in find_places(config.name, [config.path]):
            with local_file(config.name, place) as file:
                for name, data in archive_files(file, lambda path, size: matches(f"/{path}", (pattern,)), tally):
                    found = True
                    yield name, data
    if not found:
        raise UsageError(
            f"source {config.name}: no file in {config.path} matches {pattern.removeprefix('*')}. Set the source's "
            f"`path` to the folder or archive of the task {config.task}."
        )


def _sample(name: str, text: str, label: str) -> SourceDocument:
    return SourceDocument(name, f"{text}\n{label}\n".encode())


def _lines(config: LongRangeArenaConfig, pattern: str, columns: int, tally: Tally) -> Iterator[tuple[str, list[str]]]:
    """Name and columns of each line of a tab-separated file."""
    for path, data in _files(config, pattern, tally):
        stem = Path(path).stem
        for number, line in enumerate(data.decode("utf-8", errors="replace").split("\n"), 1):
            if not line.strip():
                continue
            cells = line.rstrip("\r").split("\t")
            if len(cells) != columns:
                raise UsageError(
                    f"source {config.name}: {path}, line {number}: {len(cells)} columns, not {columns}. Is it the "
                    f"Arena's own file?"
                )
            yield f"{stem}/{number}", cells


def _listops(config: LongRangeArenaConfig, pattern: str, tally: Tally) -> Iterator[SourceDocument]:
    for name, (source, target) in _lines(config, pattern, 2, tally):
        if (source, target) != ("Source", "Target"):
            words = (word for word in source.split() if word not in "()")
            yield _sample(name, " ".join(words), target.strip())


def _pairs(config: LongRangeArenaConfig, pattern: str, tally: Tally) -> Iterator[SourceDocument]:
    for name, (label, _, _, first, second) in _lines(config, pattern, 5, tally):
        if label not in _LABELS:
            raise UsageError(f"source {config.name}: {name}: the label {label[:20]!r} is none of {', '.join(_LABELS)}.")
        yield _sample(name, f"{first}\n{second}", label[0])


def _reviews(config: LongRangeArenaConfig, pattern: str, tally: Tally) -> Iterator[SourceDocument]:
    for path, data in _files(config, pattern, tally):
        *_, label, name = Path(path).parts
        text = data.decode("utf-8", errors="replace").strip()
        yield _sample(f"{label}/{Path(name).stem}", text, str(int(label == "pos")))


def _images(config: LongRangeArenaConfig, pattern: str, tally: Tally) -> Iterator[SourceDocument]:
    for path, data in _files(config, pattern, tally):
        if not data or len(data) % _RECORD:
            raise UsageError(
                f"source {config.name}: {path} has {len(data)} bytes, not a multiple of {_RECORD}: it is damaged "
                f"or not the binary version of CIFAR-10. Fetch it again."
            )
        records = np.frombuffer(data, dtype=np.uint8).reshape(-1, _RECORD)
        for number, record in enumerate(records):
            colours = record[1:].reshape(3, _SIDE, _SIDE).astype(np.float64)
            grey = np.tensordot(_GREY, colours, axes=1).astype(np.uint8)
            yield _sample(f"{Path(path).stem}/{number}", _hexadecimal(grey), str(record[0]))


def _pathfinder(config: LongRangeArenaConfig, pattern: str, tally: Tally) -> Iterator[SourceDocument]:
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise UsageError(f"source {config.name}: the task pathfinder is read from a folder; unpack {config.path}.")
    index = 0
    for path, data in _files(config, pattern, tally):
        folder = Path(path).parent.parent
        for line in data.decode("utf-8", errors="replace").splitlines():
            cells = line.split()
            if len(cells) < 4 or not cells[3].isdigit() or ".." in (*Path(cells[0]).parts, cells[1]):
                raise UsageError(
                    f"source {config.name}: {path}: the line {line[:80]!r} does not list folder, file, number and "
                    f"label. Is it the Arena's own file?"
                )
            index += 1
            if (index - 1) % 10 not in _PATHFINDER_PARTS[config.split]:
                continue
            image = folder / cells[0] / cells[1]
            pixels = _pixels(root / image)
            if pixels is None:
                tally.leave_out("images that are missing or damaged", image.as_posix())  # the release has an empty one
            else:
                yield _sample(image.with_suffix("").as_posix(), _hexadecimal(pixels), cells[3])


def _pixels(file: Path) -> np.ndarray | None:
    """Grey pixels of an image: uint8 [height, width]; None if it cannot be read."""
    from PIL import Image  # only this task needs it

    try:
        with Image.open(io.BytesIO(file.read_bytes()), formats=("PNG",)) as image:
            return np.asarray(image.convert("L"), dtype=np.uint8)
    except (OSError, ValueError, SyntaxError):
        return None


def _hexadecimal(pixels: np.ndarray) -> str:
    """Pixels, uint8 [height, width], two digits each, a line a row."""
    return "\n".join(row.tobytes().hex() for row in pixels)
