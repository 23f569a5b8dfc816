"""A corpus on disk that a test damages in one place, and tools to do that."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packed_corpora import Packed, forge

from longspan.data_pipeline.manifest import DocumentEntry, Manifest

TRAIN = "train-00000.tar"  # holds letters/a to letters/f
OTHER = "train-00001.tar"  # holds poems/g
HELD = "held_out-00000.tar"  # holds poems/h


@dataclass(frozen=True)
class Victim:
    """A copy of a corpus."""

    folder: Path
    manifest: Manifest

    @classmethod
    def copy_of(cls, corpus: Packed, folder: Path) -> Victim:
        """Copy the corpus to `folder`."""
        shutil.copytree(corpus.folder, folder)
        return cls(folder, corpus.manifest)

    def document(self, name: str) -> DocumentEntry:
        """Its entry."""
        return self.manifest.document(name)

    def member(self, name: str, extension: str) -> tarfile.TarInfo:
        """The tar member of a document."""
        entry = self.document(name)
        metadata = {}
        with tarfile.open(self.folder / entry.shard) as tar:
            for info in tar:
                key, _, kind = info.name.partition(".")
                metadata.setdefault(key, {})[kind] = info
            for kinds in metadata.values():
                if json.loads(tar.extractfile(kinds["json"]).read())["id"] == name:
                    return kinds[extension]
        raise KeyError(name)

    def read(self, url: str) -> bytes:
        """A shard's bytes."""
        return (self.folder / url).read_bytes()

    def write(self, url: str, data: bytes) -> None:
        """Replace a shard."""
        (self.folder / url).write_bytes(data)

    def flip(self, url: str, place: int, bit: int = 1) -> None:
        """Flip a bit of a file."""
        data = bytearray(self.read(url))
        data[place] ^= bit
        self.write(url, bytes(data))

    def cut(self, url: str, place: int) -> None:
        """Cut a file off."""
        self.write(url, self.read(url)[:place])

    def exchange(self, url: str, first: tuple[int, int], second: tuple[int, int]) -> None:
        """Exchange two ranges (start, stop) of a shard, the first before the second."""
        data = self.read(url)
        (a, b), (c, d) = first, second
        self.write(url, data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:])

    def sample(self, name: str) -> tuple[int, int]:
        """Start and stop of a document's sample in its shard."""
        infos = [self.member(name, kind) for kind in self.kinds]
        last = infos[-1]
        return infos[0].offset, last.offset_data + -(-last.size // 512) * 512

    @property
    def kinds(self) -> tuple[str, ...]:
        """Extensions of a sample's members, in their order."""
        return ("json", "txt") if self.manifest.vocabulary.kind == "bytes" else ("ids", "json", "len")

    def rewrite(self, url: str, keep: Any, more: dict[str, bytes] | None = None) -> None:
        """Write a shard's members that `keep(name)` times (0, 1, 2) as a well-formed archive, then those of `more`."""
        buffer = io.BytesIO()
        with tarfile.open(self.folder / url) as old, tarfile.open(fileobj=buffer, mode="w") as new:
            for info in old:
                for _ in range(int(keep(info.name))):
                    new.addfile(info, io.BytesIO(old.extractfile(info).read()))
            for name, content in (more or {}).items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                new.addfile(info, io.BytesIO(content))
        self.write(url, buffer.getvalue())

    def forge(self, name: str | None = None, **fields: object) -> None:
        """Change fields of a document's entry, or of the header, and sign the manifest anew."""

        def change(raw: dict[str, Any]) -> None:
            entry = raw if name is None else next(item for item in raw["documents"] if item["id"] == name)
            entry.update(fields)

        forge(self.folder, change)

    def fingerprint(self) -> str:
        """Hash of all names and bytes in the folder."""
        digest = hashlib.sha256()
        for file in sorted(self.folder.rglob("*")):
            content = file.read_bytes() if file.is_file() else b"folder"
            digest.update(f"{file.relative_to(self.folder)}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()
