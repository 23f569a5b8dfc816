"""The process mesh: what DeepSpeed sees of it, and starting it right and wrong."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from longspan.cluster import mesh as mesh_module
from longspan.cluster.config import ParallelConfig
from longspan.cluster.mesh import DeepSpeedMPU, Mesh
from longspan.errors import ClusterError, ConfigError, UsageError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


def test_adapter_has_nine_methods_and_no_sequence_ones() -> None:
    names = {name for name in dir(DeepSpeedMPU) if name.startswith("get_")}
    axes = ("model_parallel", "tensor_model_parallel", "data_parallel")
    assert names == {f"get_{axis}_{what}" for axis in axes for what in ("group", "rank", "world_size")}
    with pytest.raises(AttributeError):
        DeepSpeedMPU.get_sequence_parallel_world_size  # noqa: B018


def test_alone_needs_no_environment_and_can_be_built_again() -> None:
    for _ in range(2):
        mesh = Mesh.build(ParallelConfig(), device="cpu")
        assert (mesh.rank, mesh.world_size, mesh.dp_size, mesh.dp_cp_size) == (0, 1, 1, 1)
        assert DeepSpeedMPU.get_data_parallel_world_size() == 1
        assert not mesh.any_rank(False)
        assert mesh.any_rank(True)
        mesh.close()
        assert not dist.is_initialized()


def test_a_second_mesh_is_refused() -> None:
    mesh = Mesh.build(ParallelConfig(), device="cpu")
    try:
        with pytest.raises(ClusterError, match="close the other mesh"):
            Mesh.build(ParallelConfig(), device="cpu")
    finally:
        mesh.close()


@pytest.mark.parametrize("with_rank", [True, False])
def test_port_in_use_is_a_usage_error_that_names_it(monkeypatch: pytest.MonkeyPatch, with_rank: bool) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        if with_rank:
            monkeypatch.setenv("RANK", "0")
            monkeypatch.setenv("WORLD_SIZE", "1")
        with pytest.raises(UsageError, match=rf"port {port} on 127\.0\.0\.1 is in use.*MASTER_PORT") as caught:
            Mesh.build(ParallelConfig(timeout_seconds=10), device="cpu")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("environment", "messages"),
    [
        (
            {"RANK": "0"},
            ["2 problems", "WORLD_SIZE: not set, but RANK = 0 is", "MASTER_PORT: not set, but RANK = 0 is"],
        ),
        ({"WORLD_SIZE": "2"}, ["1 problem", "RANK: not set, but WORLD_SIZE = 2 is"]),
        (
            {"RANK": "first", "WORLD_SIZE": "0", "LOCAL_RANK": "-1", "LOCAL_WORLD_SIZE": "1.5", "MASTER_PORT": "70000"},
            [
                "5 problems",
                "RANK = 'first': not a whole number of 0 or more",
                "WORLD_SIZE = '0': not a whole number of 1 or more",
                "LOCAL_RANK = '-1'",
                "LOCAL_WORLD_SIZE = '1.5'",
                "MASTER_PORT = '70000': not a whole number of 1 to 65535",
            ],
        ),
        (
            {"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "2950O"},
            [
                "3 problems",
                "RANK = '4': not a whole number of 0 to 3, as WORLD_SIZE = 4",
                "LOCAL_RANK = '2': not a whole number of 0 to 1",
                "MASTER_PORT = '2950O'",
            ],
        ),
    ],
)
def test_a_wrong_environment_is_a_usage_error_that_names_every_variable(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], messages: list[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        Mesh.build(ParallelConfig(), device="cpu")
    assert caught.value.exit_code == 2 and not dist.is_initialized()
    for message in messages:
        assert message in str(caught.value)


def test_processes_that_do_not_factor_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"1 processes.*tp = 2 x parallel\.cp = 1.*multiple of 2"):
        Mesh.build(ParallelConfig(tp=2), device="cpu")
    assert not dist.is_initialized()


def test_groups_that_are_not_formed_are_a_fault_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that ends after all have met and before the watchdog looks on shows in this alone."""

    def wait(**sizes: object) -> None:
        raise dist.DistStoreError("wait timeout after 24000ms, keys: /0//1//cpu//0/1")

    monkeypatch.setattr(mesh_module.parallel_state, "initialize_model_parallel", wait)
    try:
        with pytest.raises(ClusterError, match=r"rank 0 of 1 met the others, .*groups: wait timeout"):
            Mesh.build(ParallelConfig(), "cpu")
    finally:
        dist.destroy_process_group()
