"""Compare one shard with what the manifest says of it, byte by byte, and name what differs.

Where each member lies, its header and its metadata follow from the manifest; texts and tokens have their hashes. So
every byte of a shard is accounted for, and one that is wrong is named with the document that it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from longspan.data_pipeline.entries import DocumentEntry, ShardEntry, VocabularyEntry
from longspan.data_pipeline.manifest import Manifest
from longspan.data_pipeline.shard_layout import Member, archive_size, sample_members
from longspan.data_pipeline.shard_scan import Found, ShardFile, scan_members, structure_problems

_LENGTH_BYTES = 2


@dataclass
class _Sample:
    """One document's sample: where it should lie, and what differs in its content and in the bytes around that."""

    document: DocumentEntry
    members: list[Member]
    main: Member
    content: list[str] = field(default_factory=list)
    frame: list[str] = field(default_factory=list)


def shard_problems(manifest: Manifest, shard: ShardEntry, documents: list[DocumentEntry]) -> list[str]:
    """What is wrong with a shard, one line a problem, with document and byte; empty if every byte is right.

    Args:
        documents: those that the manifest places in the shard, by offset.
    """
    try:
        file = ShardFile.open(manifest.folder / shard.url)
    except FileNotFoundError:
        return [f"shard {shard.url}: missing, with documents {_names(documents)}"]
    except OSError as error:
        return [f"shard {shard.url}: not readable: {error.strerror}"]
    try:
        lines = _Check(manifest.vocabulary, shard, file).problems(documents)
    except OSError as error:
        lines = [f"not readable: {error.strerror}"]
    finally:
        file.close()
    return [f"shard {shard.url}: {line}" for line in lines]


class _Check:
    def __init__(self, vocabulary: VocabularyEntry, shard: ShardEntry, file: ShardFile) -> None:
        self._vocabulary, self._shard, self._file = vocabulary, shard, file
        self._main = "txt" if vocabulary.kind == "bytes" else "ids"

    def problems(self, documents: list[DocumentEntry]) -> list[str]:
        """All that differs."""
        intact = self._file.size == self._shard.size
        intact = intact and self._file.sha256((0, self._file.size)) == self._shard.sha256
        samples: list[_Sample] = []
        for number, document in enumerate(documents):
            end = samples[-1].members[-1].end if samples else 0
            samples.append(self._sample(end, number, document))
        end = samples[-1].members[-1].end if samples else 0
        lines = [line for sample in samples for line in self._split_problem(sample.document)]
        end_lines = self._end_problems(end)
        if end_lines or self._file.size != archive_size(end) or any(s.content or s.frame for s in samples):
            lines += self._named(samples, end_lines)
        if not documents:
            lines.append("the manifest places no document in it")
        if not lines and not intact:
            return [
                f"{self._file.size} bytes with every document as the manifest says, but not the manifest's "
                f"{self._shard.size} bytes with sha256 {self._shard.sha256[:16]}: its entry of the shard is wrong"
            ]
        return [f"{line}; the shard has its sha256, so the manifest is wrong" if intact else line for line in lines]

    def _named(self, samples: list[_Sample], end_lines: list[str]) -> list[str]:
        """The problems of a shard that is not as it should be, each under one name only."""
        found = scan_members(self._file)
        structure = structure_problems([member.name for sample in samples for member in sample.members], found)
        size, expected = self._file.size, self._shard.size
        lost: list[_Sample] = []
        lines = structure
        if size < expected and not structure:
            lost = [sample for sample in samples if _last_byte(sample.document, self._main) > size]
            what = f"first document that is not whole: {lost[0].document.id}" if lost else "every document is whole"
            lines = [f"truncated at byte {size} of {expected}; {what}"]
        elif size != expected:
            more = f"{size - expected} more" if size > expected else f"{expected - size} fewer"
            lines = [*structure, f"{size} bytes, {more} than the manifest's {expected}"]
        elsewhere = self._contents(found)
        for sample in samples:
            if sample in lost:
                continue
            place = elsewhere.get(sample.document.sha256)
            if sample.content and place is not None and place.offset != sample.document.offset:
                if structure and place.name == sample.main.name:
                    continue  # whole, and only moved by the members before it
                sample.content[0] += f"; it is whole at byte offset {place.offset}, in {place.name}"
            lines += sample.content or sample.frame[:1]
        return lines if size < expected or structure else lines + end_lines

    def _contents(self, found: list[Found]) -> dict[str, Found]:
        """The members that hold text or tokens, by the hash that a manifest has of them."""
        lengths = {member.name: member for member in found if member.name.endswith(".len")}
        by_hash = {}
        for member in found:
            if member.name.endswith(f".{self._main}"):
                parts = [member]
                if self._main == "ids":
                    parts += [lengths[name] for name in [f"{member.name[:-4]}.len"] if name in lengths]
                by_hash[self._file.sha256(*((part.offset, part.size) for part in parts))] = member
        return by_hash

    def _sample(self, end: int, number: int, document: DocumentEntry) -> _Sample:
        """Compare a document's sample with the file. `end`: of the sample before it."""
        sizes = {self._main: document.size}
        if self._main == "ids":
            sizes["len"] = _LENGTH_BYTES * document.num_tokens
        fields = (number, document.id, document.source, document.licence, sizes)
        members = sample_members(end, *fields)
        main = _by_extension(members, self._main)
        frame: list[str] = []
        if document.offset != main.offset:
            frame.append(
                f"document {document.id}: the manifest places it at byte offset {document.offset}, "
                f"behind the document before it comes {main.offset}"
            )
            there = sample_members(max(0, end + document.offset - main.offset), *fields)
            if self._file.read(there[0].start, len(there[0].header)) == there[0].header:
                members, main = there, _by_extension(there, self._main)
        if self._main == "ids" and document.lengths_offset != _by_extension(members, "len").offset:
            frame.append(
                f"document {document.id}: the manifest places its lengths at byte offset {document.lengths_offset}, "
                f"behind its tokens and metadata comes {_by_extension(members, 'len').offset}"
            )
        frame += self._frame_problem(document, members)
        return _Sample(document, members, main, self._content_problems(document), frame)

    def _frame_problem(self, document: DocumentEntry, members: list[Member]) -> list[str]:
        """Bytes of headers, metadata and padding that are not what they should be: the first, and how many."""
        wrong: list[tuple[int, str]] = []
        for member in members:
            content_end = member.offset + member.size
            pieces = [
                (member.start, member.header, "header"),
                (content_end, bytes(member.end - content_end), "padding"),
            ]
            if member.content is not None:
                pieces.insert(1, (member.offset, member.content, "metadata"))
            for start, expected, kind in pieces:
                wrong += [(at, f"in the {kind} of {member.name}") for at in self._differing(start, expected)]
        if not wrong:
            return []
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return [f"byte {wrong[0][0]}{more} damaged, {wrong[0][1]}; document {document.id}"]

    def _differing(self, start: int, expected: bytes) -> list[int]:
        """Offsets of the bytes from `start` on that are not as expected; those behind the end of the file as well."""
        found = self._file.read(start, len(expected))
        if found == expected:
            return []
        there = np.frombuffer(found, dtype=np.uint8)
        wrong = np.flatnonzero(there != np.frombuffer(expected, dtype=np.uint8)[: len(there)])
        return [start + int(place) for place in wrong] + list(range(start + len(found), start + len(expected)))

    def _content_problems(self, document: DocumentEntry) -> list[str]:
        ranges = [(document.offset, document.size)]
        if self._main == "ids":
            ranges.append((document.lengths_offset, _LENGTH_BYTES * document.num_tokens))
        places = " and ".join(f"{start} (to {start + size})" for start, size in ranges)
        where = f"document {document.id} at byte offset {places}"
        if self._file.sha256(*ranges) != document.sha256:
            return [f"{where} does not have sha256 {document.sha256[:16]}"]
        return [] if self._main == "txt" else [f"{where}: {what}" for what in self._token_problems(document)]

    def _token_problems(self, document: DocumentEntry) -> list[str]:
        """What the tokens of a document with the right hash contradict: the vocabulary, or the manifest's counts."""
        vocabulary, problems, seen, total = self._vocabulary, [], 0, 0
        dtype = np.dtype(vocabulary.token_dtype).newbyteorder("<")
        for chunk in self._file.chunks(document.offset, document.size):
            ids = np.frombuffer(chunk, dtype=dtype)
            place = int(np.argmax(ids >= vocabulary.size))
            if ids[place] >= vocabulary.size:
                at = document.offset + (seen + place) * dtype.itemsize
                problems.append(f"token {ids[place]} at byte {at} is not below the vocabulary's {vocabulary.size}")
                break
            seen += len(ids)
        last = document.offset + document.size - dtype.itemsize
        ends = b"".join(self._file.read(place, dtype.itemsize) for place in (document.offset, last))
        if np.frombuffer(ends, dtype=dtype).tolist() != [vocabulary.bos, vocabulary.eos]:
            problems.append(f"it does not begin with bos {vocabulary.bos} and end with eos {vocabulary.eos}")
        for chunk in self._file.chunks(document.lengths_offset, _LENGTH_BYTES * document.num_tokens):
            total += int(np.frombuffer(chunk, dtype="<u2").sum(dtype=np.int64))
        if total != document.num_bytes:
            problems.append(f"its tokens stand for {total} bytes, the manifest says {document.num_bytes}")
        return problems

    def _split_problem(self, document: DocumentEntry) -> list[str]:
        split = self._shard.url.rsplit("-", 1)[0]
        if document.split == split:
            return []
        return [f"document {document.id}: the manifest says {document.split}, but the shard is of {split}"]

    def _end_problems(self, end: int) -> list[str]:
        """An archive ends with zeros."""
        at = end
        for chunk in self._file.chunks(end, archive_size(end) - end):
            places = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8))
            if len(places):
                return [f"byte {at + int(places[0])} damaged, in the end of the archive, behind all documents"]
            at += len(chunk)
        return []


def _by_extension(members: list[Member], extension: str) -> Member:
    return next(member for member in members if member.extension == extension)


def _last_byte(document: DocumentEntry, main: str) -> int:
    lengths_end = document.lengths_offset + _LENGTH_BYTES * document.num_tokens if main == "ids" else 0
    return max(document.offset + document.size, lengths_end)


def _names(documents: list[DocumentEntry]) -> str:
    names = ", ".join(document.id for document in documents[:3])
    return names if len(documents) <= 3 else f"{names} and {len(documents) - 3} more"
