"""Data sets of the Hugging Face hub, and folders in their form, streamed through the package `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longspan.data_pipeline.source_config import HuggingFaceConfig
from longspan.data_pipeline.sources.rows import Row, check_columns, row_documents, wanted_fields
from longspan.data_pipeline.sources.tally import Tally
from longspan.data_pipeline.sources.text import SourceText
from longspan.errors import UsageError


def read_hugging_face(config: HuggingFaceConfig) -> SourceText:
    """The rows of one split, in its order. Ids: the recipe's field, else the row's number from 0.

    Repositories (code) are joined from rows wherever they lie in the data set.

    Raises:
        UsageError: the package is not installed, the data set, subset, split or column is not there, or the hub does
            not answer.
    """
    tally = Tally(config.name)
    dataset = _opened(config)
    if dataset.column_names is not None:
        check_columns(config, dataset.column_names, config.dataset)
        dataset = dataset.select_columns(
            [
                column
                for column in dataset.column_names
                if any(column in (name, name.split(".")[0]) for name in wanted_fields(config))
            ]
        )
    revision = f" at {config.revision}" if config.revision else ""
    subset = f" {config.subset}" if config.subset else ""
    return SourceText(
        row_documents(config, _rows(config, dataset), tally),
        f"{config.dataset}{subset}{revision}, split {config.split}",
        tally,
    )


def _opened(config: HuggingFaceConfig) -> Any:
    try:
        import datasets  # heavy and optional
    except ImportError as error:
        raise UsageError(
            f"source {config.name}: data sets of Hugging Face need the package datasets: "
            f"`pip install 'longspan[data]'`."
        ) from error
    if config.dataset.startswith((".", "/", "~")) and not Path(config.dataset).expanduser().is_dir():
        raise UsageError(f"source {config.name}: no folder at {config.dataset}. Set the source's `dataset`.")
    try:
        return datasets.load_dataset(
            str(Path(config.dataset).expanduser()),
            name=config.subset,
            data_dir=config.data_dir,
            split=config.split,
            revision=config.revision,
            streaming=True,
        )
    except Exception as error:  # of datasets, its hub client, and whatever stores lie below them
        raise _not_loaded(config, error) from error


def _rows(config: HuggingFaceConfig, dataset: Any) -> Iterator[Row]:
    rows, number = iter(dataset), 0
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as above: a shard that is damaged or does not answer
            raise _not_loaded(config, error) from error
        yield Row(str(number), f"{config.dataset}, row {number}", fields)
        number += 1


def _not_loaded(config: HuggingFaceConfig, error: Exception) -> UsageError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return UsageError(
        f"source {config.name}: {config.dataset} cannot be loaded: {reason}. Check the name, `subset`, `split` and the "
        f"network; a data set that is on disk is opened by its folder."
    )
