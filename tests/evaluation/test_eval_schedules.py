"""The files for cron, systemd, Slurm and Kubernetes: each runs a command that exists, and its own program reads it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from longspan.trainer import cli, recipes

TEMPLATES = Path(cli.__file__).parent.parent / "cluster" / "templates"
FILES = ("evals.cron", "evals.service", "evals.sbatch", "evals-cronjob.yaml")


@pytest.mark.parametrize("name", FILES)
def test_the_command_in_it_is_one_pass_with_a_packaged_spec(name: str) -> None:
    text = (TEMPLATES / name).read_text()
    found = re.findall(r"longspan (evals reconcile [^'\"\n>&]*)", text)
    assert len(found) == 1, found
    args = cli.build_parser().parse_args(shlex.split(found[0]))
    assert args.once and args.module == "evals_reconcile" and len(args.runs) == 1
    assert all(recipes.find_recipe(spec).is_file() for spec in args.spec)


def test_the_cron_job_of_kubernetes_is_whole() -> None:
    job = yaml.safe_load((TEMPLATES / "evals-cronjob.yaml").read_text())
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert job["kind"] == "CronJob" and job["spec"]["concurrencyPolicy"] == "Forbid"
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]} and pod["restartPolicy"] == "Never"


def test_cron_has_five_fields_and_a_command() -> None:
    lines = [line for line in (TEMPLATES / "evals.cron").read_text().splitlines() if re.match(r"[\d*]", line)]
    assert len(lines) == 1 and re.match(r"\*/10( \*){4} cd ", lines[0]) and "%" not in lines[0]


def test_bash_reads_the_script_of_slurm(tmp_path: Path) -> None:
    script = TEMPLATES / "evals.sbatch"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    marks = tmp_path / "marks"
    marks.mkdir()
    for program in ("sbatch", "longspan"):
        (marks / program).write_text(f'#!/bin/bash\necho {program} "$@" >> {tmp_path}/said\n')
        (marks / program).chmod(0o755)
    text = script.read_text().replace("cd /data", f"cd {tmp_path}")
    (tmp_path / "job").write_text(text)
    done = subprocess.run(["bash", str(tmp_path / "job")], env={"PATH": f"{marks}:/usr/bin:/bin"}, timeout=30)
    said = (tmp_path / "said").read_text().splitlines()
    assert done.returncode == 0 and said[0].startswith("sbatch --begin=now+10minutes")
    assert said[1].startswith("longspan evals reconcile") and said[1].endswith("--once")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not on this machine")
def test_systemd_reads_its_units(tmp_path: Path) -> None:
    units = [tmp_path / name for name in ("evals.service", "evals.timer")]
    for unit in units:
        shutil.copy(TEMPLATES / unit.name, unit)
    done = subprocess.run(["systemd-analyze", "verify", *map(str, units)], capture_output=True, text=True, timeout=60)
    assert "Unknown" not in done.stderr and "Failed to parse" not in done.stderr, done.stderr


def test_systemd_units_belong_together() -> None:
    timer, service = ((TEMPLATES / name).read_text() for name in ("evals.timer", "evals.service"))
    assert "OnUnitInactiveSec=10min" in timer and "Type=oneshot" in service and "SuccessExitStatus=75" in service
