"""`longspan launch` before anything is started: what it refuses, and what it would start or submit."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_training import tiny_config

from longspan.cluster import launcher, network, submit
from longspan.errors import UsageError
from longspan.trainer import launch_options
from longspan.trainer.cli import main


@pytest.fixture
def recipe(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("longspan.trainer.commands.launch.visible_gpus", lambda: 0)
    path = tmp_path / "tiny.yaml"
    config = tiny_config(shards, parallel__timeout_seconds=1, data__lanes=96, training__micro_batch_lanes=2)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(path)


def launch(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["launch", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "3", "--set", "parallel.cp=2"], "1 nodes x 3 processes = 3: do not factor into parallel.tp = 1"),
        (["--nproc", "0"], "--nproc 0: 1 or more"),
        (["--nodes", "0"], "--nodes 0: 1 or more"),
        (["--max-restarts", "-1"], "--max-restarts -1: 0 or more"),
        (["--nodes", "2"], "--nodes 2: needs --rendezvous HOST:PORT"),
        (["--nodes", "2", "--rendezvous", "host"], "--rendezvous host: write it as HOST:PORT"),
        (["--nodes", "2", "--rendezvous", "no.such.host.invalid:1234"], "does not resolve here"),
        (["--set", "data.lanes=5"], "data.lanes = 5: not a multiple"),
        (["--fork-data"], "--fork-data: changes the data of a run that goes on: give it together with --resume"),
        (["--nproc", "5"], "data.lanes = 96: do not divide over 5 data-parallel ranks in micro-batches of"),
        (["--nproc", "32"], "Make lanes a multiple of 64, or use training.micro_batch_lanes: 3."),
        (["--set", "parallel.tp=3", "--nproc", "3"], "model.num_heads = 2: does not divide over parallel.tp = 3"),
        (["--set", "parallel.cp=4", "--nproc", "4"], "does not divide into 4 shares of whole blocks of 8 tokens"),
    ],
)
def test_usage_errors_end_with_2_and_start_nothing(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["launch", "local", recipe, "--run-dir", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("longspan:") == 1
    assert not (tmp_path / "run").exists()


def test_everything_wrong_with_recipe_and_options_is_one_message(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--nproc", "0", "--nodes", "-1", "--max-restarts", "-2", "--fork-data", "--time", "later"]
    options += ["--sbatch", "--mem=0\nrm -rf x", "--sbatch", "mem=0", "--set", "data.lanes=5", "--set", "modl.dim=3"]
    assert main(["launch", "slurm", recipe, *options]) == 2
    error = capsys.readouterr().err
    assert error.count("longspan:") == 1 and "9 problems in launch of" in error
    for part in ("--nproc 0", "--nodes -1", "--max-restarts -2", "--time later: not a time limit of Slurm", "rm -rf"):
        assert part in error
    assert "--sbatch 'mem=0': not one line with an option" in error and "modl: unknown key" in error


TARGETS = {
    "slurm": [],
    "ray": ["--address", "auto"],
    "kubernetes": ["--kind", "rayjob", "--image", "i", "--volume-claim", "c"],
}


@pytest.mark.parametrize("target", ["local", *TARGETS])
def test_a_run_directory_in_use_is_refused_unless_resumed(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    (tmp_path / "run/checkpoints/step-00000001").mkdir(parents=True)
    command = ["launch", target, recipe, *TARGETS.get(target, []), "--run-dir", str(tmp_path / "run"), "--dry-run"]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "holds checkpoints of an earlier run" in captured.err and not captured.out
    assert main([*command, "--resume"]) == 0


@pytest.mark.parametrize("target", ["slurm", "ray", "kubernetes"])
def test_lanes_that_do_not_divide_are_seen_before_anything_is_submitted(
    recipe: str, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    command = ["launch", target, recipe, *TARGETS[target], "--nodes", "5", "--dry-run"]
    assert main(command) == 2
    assert "data.lanes = 96: do not divide over 5 data-parallel ranks" in capsys.readouterr().err


def test_folders_of_the_pods_need_not_be_writable_here(
    recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Only the pods mount the volume; a shared file system is seen from the host that submits."""
    (tmp_path / "file").write_text("")
    place = ["--run-dir", str(tmp_path / "file" / "run"), "--dry-run"]
    assert main(["launch", "slurm", recipe, *place]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err
    assert main(["launch", "kubernetes", recipe, *TARGETS["kubernetes"], *place]) == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("5:30", 330),
        ("12:00:00", 43_200),
        ("1-2", 93_600),
        ("1-2:3", 93_780),
        ("1-2:3:4", 93_784),
        ("0", 0),
        ("UNLIMITED", 0),
        *[(wrong, None) for wrong in ("", "1:2:3:4", "1h", "1-", "-5", "1-2:3:4:5", "tomorrow", "1.5", "١")],
    ],
)
def test_slurms_forms_of_a_time_limit(text: str, seconds: int | None) -> None:
    assert launch_options.slurm_seconds(text) == seconds


def test_a_job_that_would_only_stop_and_requeue_itself_is_refused(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "slurm", recipe, "--time", "2:30", "--dry-run"]) == 2
    assert "--time 2:30: 150 s, but the job saves and requeues itself" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["", "head", "head:0", "head:70000", "http://head:1", "ray://head", ":6379"])
def test_an_address_that_ray_cannot_have(recipe: str, capsys: pytest.CaptureFixture[str], address: str) -> None:
    assert main(["launch", "ray", recipe, f"--address={address}"]) == 2
    assert f"--address {address}: write it as auto, HOST:PORT or ray://HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["{}", "ray://{}"])
def test_an_address_where_no_ray_answers_is_said_at_once(
    recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, form: str
) -> None:
    address = form.format(f"127.0.0.1:{network.free_port()}")
    started = time.monotonic()
    assert main(["launch", "ray", recipe, "--address", address, "--run-dir", str(tmp_path / "run")]) == 70
    assert time.monotonic() - started < 30
    assert f"no Ray cluster at --address {address} (ConnectionRefusedError" in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspan.trainer.commands.launch.visible_gpus", lambda: 2)
    assert main(["launch", "local", recipe, "--nproc", "4"]) == 2
    assert "--nproc 4: this node has 2 GPUs" in capsys.readouterr().err
    assert launch(capsys, "local", recipe, "--dry-run")["command"].count("--nproc-per-node 2") == 1


def test_an_unreachable_meeting_point_is_said_within_the_timeout(
    recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "is_local", lambda host: False)
    place = f"127.0.0.1:{network.free_port()}"
    started = time.monotonic()
    command = ["launch", "local", recipe, "--nodes", "2", "--rendezvous", place, "--run-dir", str(tmp_path / "run")]
    assert main(command) == 2
    assert time.monotonic() - started < 3
    assert f"no launcher answers at --rendezvous {place} within 1 s" in capsys.readouterr().err


def test_the_local_command_is_torchrun_around_train(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--set", "seed=7"]
    options = ["--nproc", "2", "--max-restarts", "3", *sets, "--run-dir", "a run", "--dry-run"]
    command = shlex.split(launch(capsys, "local", recipe, *options)["command"])
    assert command[1:3] == ["-m", "longspan.cluster.torchrun"]
    assert command[command.index("--max-restarts") + 1] == "3"
    work = command[command.index("longspan.cluster.worker") + 1 :]
    assert work == ["longspan.trainer.cli", "train", recipe, "--run-dir", "a run", "--resume", *sets]


def test_nodes_meet_at_an_address_of_this_host(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "2", "--rendezvous", "localhost:29511", "--dry-run"]
    command = launch(capsys, "local", recipe, *options)["command"]
    assert "--rdzv-endpoint 127.0.0.1:29511" in command and "is_host" not in command
    assert "--local-addr 127.0.0.1" in command
    assert network.interface_of("127.0.0.1") == "lo"


def test_a_schedulers_ranks_do_not_reach_the_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    environment = launcher.NodeLaunch("m", (), 1).environment(tmp_path)
    assert "RANK" not in environment and environment["NCCL_DEBUG"] == "INFO"


def run_script(script: str, folder: Path, train_code: int) -> tuple[int, list[str]]:
    """Run an sbatch script with stand-ins for Slurm's programs and for `longspan`; what they were called with."""
    programs = {
        "scontrol": 'echo "scontrol $*" >> calls; [ "$1" = show ] && echo node7; exit 0',
        "srun": 'shift; "$@"',
        "longspan": f'echo "longspan $*" >> calls; exit {train_code}',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "25", "SLURM_JOB_NODELIST": "node[7-8]"}
    done = subprocess.run(["bash"], input=script, cwd=folder, env=environment, text=True, timeout=20)
    return done.returncode, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("code", [0, 71, 75])
def test_the_sbatch_script_requeues_a_run_that_was_stopped(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    options = ["--nodes", "2", "--nproc", "4", "--sbatch=--partition=long", "--run-dir", "my run", "--dry-run"]
    script = launch(capsys, "slurm", recipe, *options)["script"]
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    for wanted in ("--nodes=2", "--requeue", "--signal=B:USR1@120", "--partition=long", "--gpus-per-node=4"):
        assert f"#SBATCH {wanted}" in directives
    ended, calls = run_script(script, tmp_path, code)
    assert ended == code
    assert f"longspan launch local {recipe} --run-dir my run --resume --nodes 2 --nproc 4" in calls[1]
    assert calls[1].endswith("--rendezvous node7:20025 --run-id 25")
    assert ("scontrol requeue 25" in calls) is (code == 75)


def test_the_sbatch_script_passes_the_notice_on_and_waits(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = launch(capsys, "slurm", recipe, "--dry-run")["script"]
    # told of by the batch shell only, which this asks to
    work = "sleep 0.3; kill -USR1 $PPID; for i in $(seq 100); do sleep 0.1; done"
    (tmp_path / "srun").write_text(f"#!/bin/bash\ntrap 'echo notice >> calls; exit 75' USR1\n{work}\n")
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "scontrol $*" >> calls\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "25", "SLURM_JOB_NODELIST": "node7"}
    done = subprocess.run(["bash"], input=script, cwd=tmp_path, env=environment, text=True, timeout=20)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert done.returncode == 75 and calls[-2:] == ["notice", "scontrol requeue 25"]


def test_submitting_uses_sbatch_or_says_that_it_is_not_here(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "slurm", recipe]) == 2
    assert "sbatch is not on this host" in capsys.readouterr().err
    (tmp_path / "sbatch").write_text(f"#!{sys.executable}\nimport sys; sys.exit('no such partition')\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert main(["launch", "slurm", recipe]) == 70
    assert "sbatch refused the job (exit code 1): no such partition" in capsys.readouterr().err
    (tmp_path / "sbatch").write_text(
        f"#!{sys.executable}\nimport sys; assert '--requeue' in sys.stdin.read(); print(31)\n"
    )
    assert launch(capsys, "slurm", recipe)["job_id"] == "31"


def test_the_pytorchjob_starts_one_launcher_a_pod(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--image", "longspan:1", "--volume-claim", "data", "--nodes", "3", "--nproc", "8", "--dry-run"]
    job = yaml.safe_load(launch(capsys, "kubernetes", recipe, *options)["manifest"])
    roles = job["spec"]["pytorchReplicaSpecs"]
    assert (job["kind"], roles["Master"]["replicas"], roles["Worker"]["replicas"]) == ("PyTorchJob", 1, 2)
    pod = roles["Worker"]["template"]["spec"]
    assert pod == roles["Master"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert "--nodes 3 --nproc 8" in pod["containers"][0]["args"][0]
    assert pod["containers"][0]["args"][0].endswith('--rendezvous "$MASTER_ADDR:$MASTER_PORT" --run-id tiny')
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "data"


def test_the_rayjob_runs_the_ray_launcher(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kind", "rayjob", "--image", "longspan:1", "--volume-claim", "data", "--nodes", "2", "--nproc", "8"]
    job = yaml.safe_load(launch(capsys, "kubernetes", recipe, *options, "--dry-run")["manifest"])
    assert job["spec"]["entrypoint"].startswith(
        f"longspan launch ray {recipe} --run-dir runs/tiny --resume --address auto"
    )
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert workers["replicas"] == 2
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_ray_says_what_each_node_would_run(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = launch(capsys, "ray", recipe, "--address", "auto", "--nodes", "2", "--dry-run")["command"]
    assert command[:4] == ["-m", "longspan.trainer.cli", "launch", "local"]
    assert command[-4:] == ["--rendezvous", "HOST:PORT", "--run-id", "tiny"]


def test_a_value_cannot_break_out_of_its_line() -> None:
    with pytest.raises(UsageError, match="line break"):
        submit.render("train.sbatch", {"name": "a\n#SBATCH --evil"})
