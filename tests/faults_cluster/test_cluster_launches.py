"""Launched runs that lose processes, hosts or their time: they end or go on as promised, with the same weights."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import Host, kill, summary, train_undisturbed, two_hosts, wait_for_step, weights, workers
from trainer_toy import free_port

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
Undisturbed = Callable[[int], dict[str, str]]


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(
    recipe: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    want = undisturbed(2)
    run, output = tmp_path / "run", tmp_path / "output"
    launcher = Host().launch(output, str(recipe), "--nproc", "2", "--max-restarts", "2", "--run-dir", str(run))
    wait_for_step(run, 4, launcher)
    kill(workers(launcher)[1:])
    assert launcher.wait(timeout=300) == 0, output.read_text()
    assert summary(output)["restarts"] == 1
    assert "longspan: restart 1 from the last checkpoint" in output.read_text()
    assert "died, last seen in phase" in output.read_text()
    assert weights(run) == want


def test_without_restarts_the_run_ends_with_71(recipe: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    launcher = Host().launch(output, str(recipe), "--nproc", "2", "--run-dir", str(run))
    wait_for_step(run, 4, launcher)
    kill(workers(launcher)[:1])
    assert launcher.wait(timeout=120) == 71, output.read_text()
    assert "(process" in summary(output)["error"] and "died" in summary(output)["error"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_stopped_launch_is_saved_and_goes_on_to_the_same_weights(
    recipe: Path, undisturbed: Undisturbed, tmp_path: Path, number: signal.Signals
) -> None:
    want = undisturbed(2)
    run, output = tmp_path / "run", tmp_path / "output"
    command = [str(recipe), "--nproc", "2", "--max-restarts", "1", "--run-dir", str(run)]
    launcher = Host().launch(output, *command)
    wait_for_step(run, 4, launcher)
    launcher.send_signal(number)
    assert launcher.wait(timeout=120) == 75, output.read_text()
    assert f"stopped by {number.name} after step" in summary(output)["error"]
    again = Host().launch(output, *command, "--resume")
    assert again.wait(timeout=300) == 0, output.read_text()
    assert weights(run) == want


def test_ranks_with_another_configuration_are_named_and_all_end_with_2(recipe: Path, tmp_path: Path) -> None:
    place, outputs = f"127.0.0.1:{free_port()}", [tmp_path / "a", tmp_path / "b"]
    launchers = []
    for seed, output in enumerate(outputs):
        command = [str(recipe), "--nodes", "2", "--nproc", "1", "--rendezvous", place, "--max-restarts", "1"]
        launchers.append(Host().launch(output, *command, "--run-dir", str(tmp_path / "run"), "--set", f"seed={seed}"))
        time.sleep(1)
    assert [launcher.wait(timeout=300) for launcher in launchers] == [2, 2], outputs[0].read_text()
    for output in outputs:
        error = summary(output)["error"]
        assert "the ranks cannot train together" in error and "differs in seed:" in error
    assert not (tmp_path / "run").exists()


def test_two_hosts_lose_one_hosts_ranks_and_end_with_the_same_weights(
    recipe: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """2 x 2 ranks in two network namespaces; all ranks of one are killed, torchrun restarts them all."""
    want = undisturbed(4)
    run, outputs = tmp_path / "run", [tmp_path / "a", tmp_path / "b"]
    try:
        with two_hosts() as (hosts, address):
            command = [str(recipe), "--nodes", "2", "--nproc", "2", "--rendezvous", f"{address}:29411"]
            command += ["--max-restarts", "2", "--run-dir", str(run)]
            launchers = [host.launch(output, *command) for host, output in zip(hosts, outputs, strict=True)]
            wait_for_step(run, 4, *launchers)
            kill(workers(launchers[1]))
            codes = [launcher.wait(timeout=500) for launcher in launchers]
    except PermissionError as error:
        pytest.skip(f"two hosts cannot be made here: {error}")
    text = "\n".join(output.read_text(errors="replace") for output in outputs)
    assert codes == [0, 0], text
    assert "restart 1 from the last checkpoint" in text and "died, last seen in phase" in text
    assert weights(run) == want


def test_other_random_numbers_would_be_noticed(recipe: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The comparison of weights sees a difference of the seed alone."""
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace("seed: 0", "seed: 1"))
    assert train_undisturbed(other, tmp_path / "run", 2) != undisturbed(2)


def test_a_run_on_ray_nodes(recipe: Path, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """A Ray cluster of one node runs the node's launcher with two ranks."""
    from longspan.cluster.ray_local import local_cluster
    from longspan.cluster.ray_nodes import run_on_nodes

    want, run = undisturbed(2), tmp_path / "run"

    def command(meeting: str) -> list[str]:
        options = ["--nproc", "2", "--run-dir", str(run), "--rendezvous", meeting]
        return ["-m", "longspan.trainer.cli", "launch", "local", str(recipe), *options]

    with local_cluster(cpus=2) as ray:
        codes = run_on_nodes(ray, command, nodes=1, processes=2, gpus=False, timeout_seconds=60.0, received=())
    assert codes == [0]
    assert weights(run) == want
