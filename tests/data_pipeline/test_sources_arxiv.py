"""LaTeX sources of papers: the forms that arXiv packs them in, main files, inputs, comments, what is no paper."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from longspan.data_pipeline.source_config import ArxivConfig
from longspan.data_pipeline.sources import latex
from longspan.data_pipeline.sources.latex import main_file, paper_text, strip_comments
from longspan.data_pipeline.sources.registry import open_source
from longspan.errors import UsageError
from tests.data_pipeline.source_files import tar_bytes

BODY = "We prove it. " * 200
MAIN = (
    "% draft\n\\documentclass{article}\n\\input{macros}\n\\begin{document}\n\\title{A 5\\% gain}\n"
    f"{BODY}\n\\include{{sections/one}}\n\\input sections/two \n\\input{{missing}}\n\\end{{document}}\nold text\n"
)
FILES = {
    "macros.tex": "\\newcommand{\\a}{b} % short\n",
    "paper.tex": MAIN,
    "sections/one.tex": "First.\n\\input{sections/deep}\n",
    "sections/deep.tex": "Deep. \\input{paper}\n",
    "sections/two.tex": "Second caf\xe9.\n",
    "figure.pdf": "%PDF-1.4",
}
TEXT = (
    "\\documentclass{article}\n\\newcommand{\\a}{b}\n\\begin{document}\n\\title{A 5\\% gain}\n"
    f"{BODY}\nFirst.\nDeep. \\input{{paper}}\nSecond café. \n\\input{{missing}}\n\\end{{document}}\n"
)
SINGLE = f"\\documentclass{{article}}\n\\begin{{document}}\n{BODY}\n\\end{{document}}\n"


def packed(files: dict[str, str]) -> bytes:
    return tar_bytes({name: text.encode("latin-1") for name, text in files.items()})


PAPERS = {
    "2101.00001.tar.gz": gzip.compress(packed(FILES)),
    "2101.00002.gz": gzip.compress(SINGLE.encode()),
    "2101.00003.pdf": b"%PDF-1.4",
    "2101.00004.gz": gzip.compress(b"%auto-ignore\nThis paper has been withdrawn by the author.\n"),
    "2101.00005.tar.gz": gzip.compress(packed({"readme.txt": "x", "paper.pdf": "%PDF"})),
    "2101.00006.gz": gzip.compress(SINGLE.encode())[:-9],
    "2101.00007.tar": packed({"notes.tex": "no main", "more.tex": "nor here"}),
    "2101.00008.gz": gzip.compress(b"%PDF-1.5"),
    "hep-th9901001.gz": gzip.compress(f"\\magnification=1200\n{BODY}\n\\bye\n".encode()),
}
EXPECTED = [
    ("2101.00001", TEXT),
    ("2101.00002", SINGLE),
    ("hep-th9901001", f"\\magnification=1200\n{BODY}\n\\bye\n"),
]
NOTES = {
    "source papers: left out 3 papers with a PDF only, e.g. 2101.00003.pdf",
    "source papers: left out 1 papers that were withdrawn, e.g. 2101.00004.gz",
    "source papers: left out 1 papers in a damaged archive, e.g. 2101.00006.gz",
    "source papers: left out 1 papers without a main file, e.g. 2101.00007.tar",
}


def read(*paths: Path, **settings: Any) -> tuple[list[tuple[str, str]], set[str]]:
    text = open_source(ArxivConfig(kind="arxiv", name="papers", paths=tuple(map(str, paths)), **settings))
    return [(document.name, document.text.decode()) for document in text.documents], set(text.notes)


def test_papers_in_a_folder(tmp_path: Path) -> None:
    for name, data in PAPERS.items():
        (tmp_path / name).write_bytes(data)
    found, notes = read(tmp_path)
    assert found == EXPECTED
    assert notes == NOTES


def test_papers_in_a_bulk_archive(tmp_path: Path) -> None:
    (tmp_path / "arXiv_src_2101_001.tar").write_bytes(
        tar_bytes({f"2101/{name}": data for name, data in PAPERS.items()})
    )
    found, notes = read(tmp_path / "*.tar", bulk=True)
    assert found == EXPECTED
    assert notes == {note.replace("e.g. ", "e.g. 2101/") for note in NOTES}


def test_nothing_but_withdrawn_papers(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(PAPERS["2101.00004.gz"])
    with pytest.raises(UsageError, match="no document is left; left out: 1 papers that were withdrawn"):
        read(tmp_path)
    (tmp_path / "b.tar").write_bytes(b"<html>")
    with pytest.raises(UsageError, match=r"b\.tar cannot be read"):
        read(tmp_path / "b.tar", bulk=True)


def test_links_in_a_paper_are_not_followed(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        item = tarfile.TarInfo("paper.tex")
        item.size = len(SINGLE)
        archive.addfile(item, io.BytesIO(SINGLE.replace("We prove", "\\input{secret}", 1).encode()[: len(SINGLE)]))
        link = tarfile.TarInfo("secret.tex")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    assert "\\input{secret}" in read(tmp_path)[0][0][1]


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ("a % b\nc", "a\nc"),
        ("a\n  % whole line\nc", "a\nc"),
        ("5\\% of \\\\% b\nc", "5\\% of \\\\\nc"),
        ("\\verb|%x| % y\n", "\\verb|%x|\n"),
        ("\\url{http://x/%20y} % z\n", "\\url{http://x/%20y}\n"),
        ("\\begin{verbatim}\n% kept\n\\end{verbatim}\n", "\\begin{verbatim}\n% kept\n\\end{verbatim}\n"),
        ("a\n\\begin{comment}\nb\n\\end{comment}\nc", "a\nc"),
        ("% first\nb", "b"),
        ("a%", "a"),
    ],
)
def test_comments(source: str, kept: str) -> None:
    assert strip_comments(source) == kept


def test_main_files() -> None:
    inner = "\\documentclass[main]{subfiles}\n\\begin{document}\nlong long long long\n\\end{document}"
    outer = "\\documentclass{article}\\begin{document}\\subfile{part}\\end{document}"
    assert main_file({"part.tex": inner, "z.tex": outer}) == "z.tex"
    assert main_file({"a.tex": SINGLE, "ms.tex": SINGLE[: len(SINGLE) // 2]}) == "ms.tex"
    assert main_file({"a.tex": SINGLE, "b.tex": SINGLE + "more"}) == "b.tex"
    assert main_file({"a.tex": "% \\documentclass{x}", "b.tex": "text"}) is None
    assert main_file({"a.tex": "\\documentstyle{article} text"}) == "a.tex"


def test_inputs_that_read_each_other_end(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "m.tex": "\\documentclass{x}\\begin{document}\\input{a}\\end{document}",
        "a.tex": "A\\input{b}",
        "b.tex": "B\\input{a}",
    }
    text, _ = paper_text(files)
    assert text == "\\documentclass{x}\\begin{document}AB\\input{a}\\end{document}\n"
    growing = {"m.tex": "\\documentclass{x}\\input{f0}"} | {
        f"f{i}.tex": f"\\input{{f{i + 1}}}\\input{{f{i + 1}}}" for i in range(40)
    }
    monkeypatch.setattr(latex, "_LONGEST_PAPER", 10_000)
    assert paper_text(growing)[1] == "papers whose inputs make them too long"
