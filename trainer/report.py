"""`RUN/report.html`: one self-contained page about a run, whatever state the run is in."""

from __future__ import annotations

import os
from pathlib import Path

from longspan.errors import UsageError
from longspan.trainer.report_data import RunRecord, read_run
from longspan.trainer.report_evaluation import evaluation_sections
from longspan.trainer.report_html import document
from longspan.trainer.report_length import length_sections
from longspan.trainer.report_parts import checkpoints, configuration, data, header, machine, samples, tiles
from longspan.trainer.report_training import loss_section, speed_sections

REPORT = "report.html"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write RUN/report.html, or `out`, anew; a reader sees the old page or the new one, never a part.

    Returns:
        Where it is.

    Raises:
        UsageError: `run` is no run directory, or cannot be written to.
    """
    page = render(read_run(run))
    path = out or run / REPORT
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}. Change the permissions of {path.parent}."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def render(record: RunRecord) -> str:
    """The whole page as HTML text that is also well-formed XML; refers to nothing outside itself."""
    sections = [
        header(record),
        tiles(record),
        *length_sections(record),
        *evaluation_sections(record),
        loss_section(record),
        *speed_sections(record),
        samples(record),
        data(record),
        checkpoints(record),
        machine(record),
        configuration(record),
    ]
    return document(str(record.config.get("name") or record.path.name), "\n".join(filter(None, sections)))
