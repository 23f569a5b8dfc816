"""WebDataset shards that exist already: tar files whose members `KEY.SUFFIX` with one key form a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator

from longspan.data_pipeline.cleaning.registry import Cleaner
from longspan.data_pipeline.source_config import WebDatasetConfig
from longspan.data_pipeline.sources.archives import archive_files
from longspan.data_pipeline.sources.places import Place, find_places, local_file
from longspan.data_pipeline.sources.tally import Tally
from longspan.data_pipeline.sources.text import SourceDocument, SourceText, cleaned_text
from longspan.errors import UsageError


def read_webdataset(config: WebDatasetConfig) -> SourceText:
    """One document a sample, in the order of shards and members; its id is the key.

    Members other than the text are never read, so nothing in them is decoded or run.

    Raises:
        UsageError: a shard is missing, damaged or does not answer, or no sample has the text's member.
    """
    tally = Tally(config.name)
    places = find_places(config.name, config.paths)
    return SourceText(_documents(config, places, tally), f"{len(places)} WebDataset shards", tally)


def split_key(path: str) -> tuple[str, str]:
    """Key and suffix of a member: what stands before and behind the first dot of its file name."""
    folder, slash, name = path.rpartition("/")
    stem, _, suffix = name.partition(".")
    return f"{folder}{slash}{stem}", suffix


def _documents(config: WebDatasetConfig, places: list[Place], tally: Tally) -> Iterator[SourceDocument]:
    cleaner = Cleaner(config.clean)
    for key, address, data in _samples(config, places, tally):
        try:
            raw = _json_text(config, address, key, data, tally) if _is_json(config) else data
            text = None if raw is None else cleaned_text(cleaner, key, raw, tally)
        except UnicodeDecodeError:
            tally.leave_out("samples that are not UTF-8 (the rule `encoding` repairs them)", key)
            continue
        if text is not None:
            yield SourceDocument(key, text)


def _samples(config: WebDatasetConfig, places: list[Place], tally: Tally) -> Iterator[tuple[str, str, bytes]]:
    """Key, shard and bytes of the text of each sample that has one."""
    for place in places:
        members = _Members(config.text_member, tally)
        with local_file(config.name, place) as file:
            for path, data in archive_files(file, members.takes, tally):
                yield split_key(path)[0], place.address, data
        members.end_sample()
        if not members.num_texts:
            raise UsageError(
                f"source {config.name}: {place.address}: no member ends in .{config.text_member}. Set the source's "
                f"`text_member` to the suffix of the texts."
            )


class _Members:
    """Takes the texts among the members of a shard, and counts the samples that have none."""

    def __init__(self, text_member: str, tally: Tally) -> None:
        self.num_texts = 0
        self._text_member, self._tally = text_member, tally
        self._key: str | None = None
        self._has_text = False

    def takes(self, path: str, size: int) -> bool:
        key, suffix = split_key(path)
        if key != self._key:
            self.end_sample()
            self._key, self._has_text = key, False
        is_text = suffix == self._text_member
        self._has_text |= is_text
        self.num_texts += is_text
        return is_text

    def end_sample(self) -> None:
        if self._key is not None and not self._has_text:
            self._tally.leave_out(f"samples without a member .{self._text_member}", self._key)


def _is_json(config: WebDatasetConfig) -> bool:
    return config.text_member.split(".")[-1] == "json"


def _json_text(config: WebDatasetConfig, address: str, key: str, data: bytes, tally: Tally) -> bytes | None:
    """The text field of a sample; None, and counted, if it is null or no text that UTF-8 can hold, as for other rows.

    Raises:
        UsageError: the sample is no JSON object with that field, or the field holds something else than text.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"source {config.name}: {address}, sample {key}: not JSON: {error}. Mend the shard."
        ) from error
    if isinstance(fields, dict) and fields.get(config.text_field, "") is None:
        tally.leave_out("samples whose text is null", key)
        return None
    text = fields.get(config.text_field) if isinstance(fields, dict) else None
    if not isinstance(text, str):
        known = ", ".join(sorted(fields)) if isinstance(fields, dict) else type(fields).__name__
        raise UsageError(
            f"source {config.name}: {address}, sample {key}: no text in the field {config.text_field}. There are: "
            f"{known}. Set the source's `text_field`."
        )
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        tally.leave_out("samples with half of a surrogate pair", key)
        return None
