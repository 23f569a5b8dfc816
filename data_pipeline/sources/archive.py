"""Files inside archives, local or behind a URL: one document per file, or per folder of files."""

from __future__ import annotations

from collections.abc import Iterator

from longspan.data_pipeline.cleaning.registry import Cleaner
from longspan.data_pipeline.source_config import ArchiveConfig
from longspan.data_pipeline.sources.archives import Selection, archive_files
from longspan.data_pipeline.sources.grouping import SourceFile, group_of, sorted_groups
from longspan.data_pipeline.sources.places import Place, find_places, local_file, without_suffix
from longspan.data_pipeline.sources.tally import Tally
from longspan.data_pipeline.sources.text import SourceDocument, SourceText, cleaned_text

_SUFFIXES = (".zip", ".whl", ".deb", ".tgz", ".txz", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def read_archives(config: ArchiveConfig) -> SourceText:
    """The files that match, archive after archive: single files in the archive's own order, repositories by name.

    Ids are paths in the archive; with several archives the archive's name stands before them.

    Raises:
        UsageError: an archive is missing, does not answer, or is damaged.
    """
    tally = Tally(config.name)
    places = find_places(config.name, config.paths)
    if config.form == "files":
        documents: Iterator[SourceDocument] = (
            SourceDocument(name, text) for _, name, text in _texts(config, places, tally)
        )
    else:
        documents = sorted_groups(_grouped(config, places, tally), config.form == "repository", tally)
    return SourceText(documents, f"{len(places)} archives", tally)


def _texts(config: ArchiveConfig, places: list[Place], tally: Tally) -> Iterator[tuple[str, str, bytes]]:
    """Name of the archive, path and cleaned text of each file that counts."""
    cleaner = Cleaner(config.clean)
    selection = Selection(config.include, config.exclude, config.max_file_bytes, tally)
    for place in places:
        archive = without_suffix(place.name, _SUFFIXES)
        with local_file(config.name, place) as file:
            for path, data in archive_files(file, selection.takes, tally):
                name = f"{archive}/{path}" if len(places) > 1 else path
                try:
                    text = cleaned_text(cleaner, path, data, tally)
                except UnicodeDecodeError:
                    tally.leave_out("files that are not UTF-8 (the rule `encoding` repairs them)", name)
                    continue
                if text is not None:
                    yield archive, name, text


def _grouped(config: ArchiveConfig, places: list[Place], tally: Tally) -> Iterator[SourceFile]:
    # with several archives the first folder of a name is the archive
    depth = config.repository_depth + 1 if len(places) > 1 else config.repository_depth
    for archive, name, text in _texts(config, places, tally):
        place = group_of(name, depth, archive)
        if place is None:
            tally.leave_out("files above the folders that are repositories", name)
        else:
            yield SourceFile(*place, text)
