"""The Long Range Arena's files as documents, one a sample."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longspan.data_pipeline.source_config import LongRangeArenaConfig
from longspan.data_pipeline.sources.registry import open_source
from longspan.errors import UsageError
from tests.data_pipeline.source_files import folder, zip_bytes


def read(task: str, path: Path, split: str = "train") -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    raw: dict[str, Any] = {"kind": "long_range_arena", "name": "lra", "task": task, "path": str(path), "split": split}
    text = open_source(LongRangeArenaConfig.model_validate(raw))
    return [(document.name, document.text.decode()) for document in text.documents], text.notes


LISTOPS = b"Source\tTarget\n( ( [MAX 4 ) ( ( [MIN 2 ) 3 ] ) ] )\t4\n"


def test_listops_from_a_folder_and_an_archive(tmp_path: Path) -> None:
    files = {"lra_release/listops-1000/basic_train.tsv": LISTOPS, "lra_release/listops-1000/basic_val.tsv": b"x"}
    expected = [("basic_train/2", "[MAX 4 [MIN 2 3 ] ]\n4\n")]
    assert read("listops", folder(tmp_path / "f", files))[0] == expected
    (tmp_path / "lra.zip").write_bytes(zip_bytes(files))
    assert read("listops", tmp_path / "lra.zip")[0] == expected
    with pytest.raises(UsageError, match=r"basic_val\.tsv, line 1: 1 columns, not 2"):
        read("listops", tmp_path / "f", "validation")


def test_reviews(tmp_path: Path) -> None:
    files = {
        "train/pos/10_9.txt": b"good",
        "train/neg/2_1.txt": b"bad\xff",
        "train/unsup/3_0.txt": b"?",
        "test/pos/1_9.txt": b"t",
    }
    root = folder(tmp_path / "aclImdb", files)
    assert read("text", root)[0] == [("neg/2_1", "bad\ufffd\n0\n"), ("pos/10_9", "good\n1\n")]
    assert read("text", root, "test")[0] == [("pos/1_9", "t\n1\n")]
    with pytest.raises(UsageError, match=r"the task text has no split validation\. Allowed: train, test"):
        read("text", root, "validation")


def test_pairs(tmp_path: Path) -> None:
    line = b'1.0\tP01\tP02\tb"First abstract"\tb"Second"\n'
    root = folder(tmp_path, {"tsv_data/new_aan_pairs.eval.tsv": line})
    found = read("retrieval", root, "validation")[0]
    assert found == [("new_aan_pairs.eval/1", 'b"First abstract"\nb"Second"\n1\n')]
    folder(tmp_path, {"tsv_data/new_aan_pairs.eval.tsv": b"yes\tP01\tP02\ta\tb\n"})
    with pytest.raises(UsageError, match=r"new_aan_pairs\.eval/1: the label 'yes' is none of 0, 1"):
        read("retrieval", root, "validation")


def test_images(tmp_path: Path) -> None:
    pixels = np.zeros((3, 32, 32), dtype=np.uint8)
    pixels[:, 0, 0] = 255, 0, 0
    pixels[:, 0, 1] = 200
    record = bytes([7]) + pixels.tobytes()
    root = folder(tmp_path, {"cifar-10-batches-bin/data_batch_1.bin": record * 2})
    found = read("image", root)[0]
    assert [name for name, _ in found] == ["data_batch_1/0", "data_batch_1/1"]
    lines = found[0][1].splitlines()
    assert len(lines) == 33
    assert lines[0] == "4cc7" + "00" * 30  # 0.2989 * 255 = 76, and 199.98, cut as the Arena's pipeline does
    assert lines[-1] == "7"
    folder(tmp_path, {"cifar-10-batches-bin/data_batch_1.bin": record[:-1]})
    with pytest.raises(UsageError, match="not a multiple of 3073"):
        read("image", root)
    with pytest.raises(UsageError, match=r"no file in .* matches test_batch\.bin"):
        read("image", root, "test")


def test_pathfinder(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).save(buffer, "PNG")
    lines = "".join(f"imgs/0 sample_{number}.png {number} {number % 2} 1.0\n" for number in range(10))
    images = {f"hard/imgs/0/sample_{number}.png": buffer.getvalue() for number in range(10)}
    root = folder(tmp_path, {"hard/metadata/0.npy": lines.encode(), **images, "hard/imgs/0/sample_3.png": b""})
    found, notes = read("pathfinder", root)
    assert [name for name, _ in found] == [f"hard/imgs/0/sample_{number}" for number in (0, 1, 2, 4, 5, 6, 7)]
    assert found[1][1] == "00010203\n04050607\n08090a0b\n0c0d0e0f\n1\n"
    assert notes == ("source lra: left out 1 images that are missing or damaged, e.g. hard/imgs/0/sample_3.png",)
    assert [name[-1] for name, _ in read("pathfinder", root, "validation")[0]] == ["8"]
    assert [name[-1] for name, _ in read("pathfinder", root, "test")[0]] == ["9"]
    folder(tmp_path, {"hard/metadata/0.npy": b"../../x y.png 1 1\n"})
    with pytest.raises(UsageError, match="does not list folder, file, number and label"):
        read("pathfinder", root)


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="source lra: no file at"):
        read("listops", tmp_path / "gone")
    with pytest.raises(UsageError, match=r"no file in .* matches basic_train\.tsv"):
        read("listops", tmp_path)
