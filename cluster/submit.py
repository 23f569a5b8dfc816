"""What is handed to a scheduler: scripts and manifests from `cluster/templates/`, and the programs that take them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from longspan.errors import ClusterError, UsageError

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_HOLE = re.compile(r"\{\{(\w+)\}\}")
_SUBMIT_SECONDS = 120.0


def render(template: str, values: dict[str, str]) -> str:
    """The template with each {{name}} replaced; lines that become empty are left out.

    Args:
        template: file in `cluster/templates/`.
        values: for all names that it has; each is one line, or several for {{options}}.

    Raises:
        KeyError: a name has no value.
        UsageError: a value would break out of its line.
    """
    for name, value in values.items():
        if name != "options" and any(not character.isprintable() for character in value):
            raise UsageError(f"{name} = {value!r} holds a line break or control character; leave it out.")
    lines = (_TEMPLATES / template).read_text(encoding="utf-8").splitlines()
    filled = [(_HOLE.sub(lambda hole: values[hole.group(1)], line), line) for line in lines]
    return "\n".join(new for new, old in filled if new or not old) + "\n"


def job_name(name: str) -> str:
    """`name` as Kubernetes and Slurm take it: lower-case letters, digits and dashes, at most 50 of them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50].rstrip("-") or "longspan"


def submit(program: str, arguments: list[str], text: str) -> str:
    """Give `text` to a scheduler's program on its standard input; returns what it answered.

    Raises:
        UsageError: the program is not there.
        ClusterError: it refused.
    """
    path = shutil.which(program)
    if path is None:
        raise UsageError(f"{program} is not on this host. Run this where it is, or print the job with --dry-run.")
    try:
        done = subprocess.run(  # noqa: S603 - found program, no shell
            [path, *arguments], input=text, capture_output=True, text=True, timeout=_SUBMIT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{program} did not answer within {_SUBMIT_SECONDS:.0f} s.") from error
    if done.returncode:
        raise ClusterError(f"{program} refused the job (exit code {done.returncode}): {done.stderr.strip()[-2000:]}")
    return done.stdout.strip()
