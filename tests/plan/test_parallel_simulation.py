"""Formulas against the simulation of the schedule, over a grid; and the simulation against schedules worked by hand."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from longspan.modeling.config import ModelConfig
from longspan.trainer.plan import predict as formulas
from longspan.trainer.plan.events import Simulation
from longspan.trainer.plan.hardware import HostRates, LinkRates, load_hardware
from longspan.trainer.plan.layout import Job, Layout
from longspan.trainer.plan.links import Group, collective_seconds
from longspan.trainer.plan.predict import predict
from longspan.trainer.plan.setting import Setting
from longspan.trainer.plan.simulate import simulate
from longspan.trainer.plan.traffic import LayerMessages
from longspan.trainer.plan.work import LayerWork, Seconds, Work, Workshop
from longspan.trainer.recipes import read_recipe

RATES = ("launch_us", "engine_us", "stage2_tensor_us", "stage3_tensor_us", "message_us")
MEASURED = load_hardware("h100")
# With launches that take no time: where they bound a step, formulas and simulation agree whatever the schedule.
HARDWARE = MEASURED.model_copy(update={"host": HostRates(source="none", **dict.fromkeys(RATES, 0.0))})
# A formula may be late by this much, but never early: it takes the slowest link for all neighbours, most of all where
# shares are a block long, and adds up what stage 3 gathers while ranks wait for a state anyway.
ONE_HOST, SEVERAL_HOSTS, STAGE_THREE, SHORT_SHARES, EARLY = 1.02, 1.08, 1.10, 1.15, 0.999


def job(name: str, segment: int, lanes: int = 16, state_grad: str = "full", repeat: int = 2) -> Job:
    """`repeat`: at most so many equal layers in a row, so that a simulation is short."""
    raw = read_recipe(f"configs/model/{name}.yaml")["model"]
    layers = [{**layer, "repeat": min(repeat, layer.get("repeat", 1))} for layer in raw["layers"]]
    model = ModelConfig(**{**raw, "vocab_size": 32_128, "dropout": 0.0, "layers": layers})
    return Job(Setting(model, 8, segment, 1, "bf16", "none", "adamw", 1), lanes, state_grad)


MESHES = ((2, 1, 1), (1, 2, 1), (1, 8, 1), (2, 2, 2), (2, 8, 2))


def ratios(job: Job, meshes: Any = MESHES) -> list[tuple[float, Layout]]:
    """Predicted over simulated seconds, of one layout each."""
    shop, found = Workshop(job, HARDWARE), []
    policies = ("none", "layer")
    for (dp, cp, tp), stage, slices, policy, rows in itertools.product(meshes, (1, 2, 3), (1, 4), policies, (1, 4)):
        if slices > rows or (cp == 1 and slices > 1) or job.lanes % (dp * rows):
            continue
        layout = Layout(dp, cp, tp, stage, slices, policy, rows, job.lanes // dp // rows)
        work = shop.work(layout)
        found.append((predict(layout, work, HARDWARE).seconds / simulate(layout, work, HARDWARE), layout))
    return found


def bound(job: Job, layout: Layout) -> float:
    if layout.cp * layout.tp > 8 and job.setting.segment_tokens // layout.cp < 1024:
        return SHORT_SHARES
    if layout.zero_stage == 3 and layout.cp > 1:
        return STAGE_THREE
    return ONE_HOST if layout.cp * layout.tp <= 8 else SEVERAL_HOSTS


def disagreements(job: Job, meshes: Any = MESHES) -> list[tuple[float, Layout]]:
    return [(ratio, layout) for ratio, layout in ratios(job, meshes) if not EARLY <= ratio <= bound(job, layout)]


@pytest.mark.parametrize("state_grad", ["full", "truncate"])
@pytest.mark.parametrize("segment", [8192, 65_536])
@pytest.mark.parametrize("name", ["rec_fixed_skip_12l", "rec_fixed_skip_1300m", "hybrid_12l"])
def test_formulas_agree(name: str, segment: int, state_grad: str) -> None:
    assert not disagreements(job(name, segment, lanes=8, state_grad=state_grad), MESHES[1:])


@pytest.mark.parametrize("name", ["slide_13l", "full_12l", "feedback_fixed_skip_12l"])
def test_formulas_agree_without_a_state_path_of_their_own(name: str) -> None:
    assert not disagreements(job(name, 16_384, lanes=8))


@pytest.mark.long
@pytest.mark.parametrize("segment", [8192, 65_536])
@pytest.mark.parametrize(
    "name",
    ["rec_fixed_skip_12l", "rec_fixed_skip_1300m", "hybrid_12l", "slide_13l", "full_12l", "feedback_fixed_skip_12l"],
)
def test_formulas_agree_at_full_depth(name: str, segment: int) -> None:
    for state_grad in ("full", "truncate"):
        meshes = ((2, 1, 1), (1, 2, 1), (1, 8, 1), (4, 8, 2), (2, 16, 1), (8, 2, 2), (16, 2, 1))
        assert not disagreements(job(name, segment, 64, state_grad, repeat=24), meshes)


def test_formulas_agree_where_launches_bound_the_step() -> None:
    small = job("rec_fixed_skip_12l", 8192, lanes=8)
    for mesh, stage, policy, rows in (((2, 1, 1), 2, "none", 1), ((1, 2, 2), 1, "layer", 4), ((1, 8, 1), 3, "none", 8)):
        layout = Layout(*mesh, stage, 1, policy, rows, 8 // mesh[0] // rows)  # type: ignore[arg-type]
        work = Workshop(small, MEASURED).work(layout)
        found = predict(layout, work, MEASURED)
        assert found.host > 0
        assert EARLY <= found.seconds / simulate(layout, work, MEASURED) <= STAGE_THREE


def test_a_forgotten_slice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a hand-over in slices costs as much as one in one piece."""
    right = formulas.chain_seconds
    monkeypatch.setattr(
        formulas, "chain_seconds", lambda work, *rest: right(dataclasses.replace(work, slices=1), *rest)
    )
    found = disagreements(job("rec_fixed_skip_12l", 65_536, lanes=8), ((1, 8, 1),))
    assert {layout.state_slices for _, layout in found} == {4}


def with_layers(work: Work, change: Any) -> Work:
    return dataclasses.replace(work, layers=tuple(change(layer) for layer in work.layers))


def test_a_state_that_is_sent_again_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: ranks wait for the state a second time where a layer is computed again."""

    def again(layer: LayerWork) -> LayerWork:
        return dataclasses.replace(layer, forward=layer.again)

    right = formulas.chain_seconds
    monkeypatch.setattr(
        formulas, "chain_seconds", lambda work, *rest: right(work, *rest) + right(with_layers(work, again), *rest)
    )
    found = disagreements(job("rec_fixed_skip_12l", 65_536, lanes=8), ((1, 8, 1),))
    assert {layout.activation_checkpointing for _, layout in found} == {"layer"}


def test_window_attention_that_delays_the_state_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: what runs beside the chain does not fill the wait for it."""

    def alone(layer: LayerWork) -> LayerWork:
        forward, backward = (dataclasses.replace(one, beside=0.0) for one in (layer.forward, layer.backward))
        return dataclasses.replace(layer, forward=forward, backward=backward)

    right = formulas.chain_seconds
    assert not disagreements(job("rec_fixed_skip_12l", 65_536, lanes=8, repeat=1), ((1, 8, 1),))
    monkeypatch.setattr(formulas, "chain_seconds", lambda work, *rest: right(with_layers(work, alone), *rest))
    assert disagreements(job("rec_fixed_skip_12l", 65_536, lanes=8, repeat=1), ((1, 8, 1),))


def test_a_ring_that_hides_too_much_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: keys and values arrive at once."""
    monkeypatch.setattr(formulas, "ring_seconds", lambda *_: formulas.Passes())
    assert disagreements(job("full_12l", 16_384, lanes=8), ((2, 8, 2),))


def test_zero_that_hides_everything_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: stage 3 costs nothing."""
    monkeypatch.setattr(formulas, "zero_seconds", lambda *_: 0.0)
    found = disagreements(job("rec_fixed_skip_1300m", 8192, lanes=16), ((16, 1, 1),))
    assert 3 in {layout.zero_stage for _, layout in found}


def bare_work(layers: list[LayerWork], slices: int = 1, truncate: bool = False) -> Work:
    return Work(tuple(layers), 0.0, 0.0, (0.0, 0.0, 0.0), (0.0, 0), 0.0, 0.0, 0.0, (), slices, 1, truncate)


def free_links() -> Any:
    """Messages take no time, so that what is left can be counted by hand."""
    link = {"gigabytes_per_second": 1e12, "latency_us": 0, "collective_us": 0}
    links = LinkRates(source="by hand", gpus_per_host=8, nvlink=link, infiniband=link)  # type: ignore[arg-type]
    return HARDWARE.model_copy(update={"links": links})


@pytest.mark.parametrize(
    ("ranks", "slices", "seconds"), [(2, 1, 9 + 3), (2, 2, 9 + 1.5), (4, 1, 9 + 9), (8, 4, 9 + 5.25)]
)
def test_serial_hand_over_by_hand(ranks: int, slices: int, seconds: float) -> None:
    """A chain of 1 s forward and 2 s backward among 6 s of other work: + 3 (R-1)/M."""
    layer = LayerWork(Seconds(1.0, 1.0, 0.0, 1.0), Seconds(2.0, 2.0, 0.0, 2.0), Seconds(), LayerMessages(carry=1.0))
    layout = Layout(1, ranks, 1, 0, slices, "none", 8, 1)
    work, hardware = bare_work([layer], slices), free_links()
    assert simulate(layout, work, hardware) == pytest.approx(seconds)
    assert predict(layout, work, hardware).seconds == pytest.approx(seconds)


def test_efficiency_is_the_formula_of_the_serial_share() -> None:
    """1 / (1 - s + s (R-1+M)/M) with s = 0.2."""
    ranks, slices, share = 4, 2, 0.2
    layer = LayerWork(Seconds(0.4, share, 0.0, 0.4), Seconds(), Seconds(), LayerMessages(carry=1.0))
    layout = Layout(1, ranks, 1, 0, slices, "none", 8, 1)
    want = 1 / (1 - share + share * (ranks - 1 + slices) / slices)
    assert 1 / simulate(layout, bare_work([layer], slices), free_links()) == pytest.approx(want)


@pytest.mark.parametrize(("ranks", "slices", "seconds"), [(2, 1, 12), (4, 1, 12 + 9 - 3), (4, 4, 12)])
def test_work_beside_the_chain_fills_the_wait_by_hand(ranks: int, slices: int, seconds: float) -> None:
    """And 1 s beside it in the forward, 2 s in the backward pass: the wait of 3 (R-1)/M is up to 3 s shorter."""
    layer = LayerWork(
        Seconds(1.0, 1.0, 0.0, 1.0, 1.0), Seconds(2.0, 2.0, 0.0, 2.0, 2.0), Seconds(), LayerMessages(carry=1.0)
    )
    layout = Layout(1, ranks, 1, 0, slices, "none", 8, 1)
    work, hardware = bare_work([layer], slices), free_links()
    assert simulate(layout, work, hardware) == pytest.approx(seconds)
    assert predict(layout, work, hardware).seconds == pytest.approx(seconds)


def test_recomputation_waits_for_nobody() -> None:
    """2 s of a chain and 1 s beside it again: they add 3 s to four ranks as to one."""
    seconds = Seconds(chain=2.0, beside=1.0)
    layer = LayerWork(seconds, seconds, seconds, LayerMessages(halo=(1.0,), carry=1.0))
    layout = Layout(1, 4, 1, 0, 1, "layer", 8, 1)
    assert simulate(layout, bare_work([layer]), free_links()) == pytest.approx(3 * 3 + 2 * (6 - 1))
    assert predict(layout, bare_work([layer]), free_links()).seconds == pytest.approx(3 * 3 + 2 * (6 - 1))


def test_truncated_gradients_do_not_wait() -> None:
    layer = LayerWork(Seconds(chain=1.0), Seconds(chain=2.0), Seconds(), LayerMessages(carry=1.0))
    layout = Layout(1, 4, 1, 0, 1, "none", 8, 1)
    # the last rank begins three seconds late and then goes on alone
    assert simulate(layout, bare_work([layer], truncate=True), free_links()) == pytest.approx(3 + 3)


def test_a_ring_by_hand() -> None:
    """Three blocks of 1 s, fetches of 1.5 s: two of them are late by 0.5."""
    link = {"gigabytes_per_second": 1, "latency_us": 0, "collective_us": 0}
    links = LinkRates(source="by hand", gpus_per_host=8, nvlink=link, infiniband=link)  # type: ignore[arg-type]
    hardware = HARDWARE.model_copy(update={"links": links})
    messages = LayerMessages(ring=1.5e9, ring_gradients=0.0, ring_hops=2)
    work = bare_work([LayerWork(Seconds(ring=3.0), Seconds(ring=30.0), Seconds(), messages)])
    layout = Layout(1, 3, 1, 0, 1, "none", 1, 1)
    assert simulate(layout, work, hardware) == pytest.approx(4.0 + 30.0)
    assert predict(layout, work, hardware).seconds == pytest.approx(4.0 + 30.0)


def ring_seconds(size: int, host: int, num_bytes: float, passes: int) -> float:
    """A collective simulated step by step: a ring for every rank of a host, each leaving it by another adapter."""
    links, sim = HARDWARE.links, Simulation()
    hosts = max(1, size // host)
    rings = size if hosts == 1 else host
    for ring in range(rings):
        # within a host ring j begins with member j + 1 and ends with j, whose adapter goes on to the next host
        order = (
            [h * host + (ring + 1 + i) % host for h in range(hosts) for i in range(host)]
            if hosts > 1
            else [*range(size)]
        )
        before: dict[int, int] = {}
        for _ in range(passes * (size - 1)):
            now = {}
            for place, source in enumerate(order):
                target = order[(place + 1) % size]
                near = hosts == 1 or source // host == target // host
                rate = (links.nvlink if near else links.infiniband).gigabytes_per_second * 1e9
                way = "near" if near else "far"
                after = [before[source]] if source in before else []
                wires = (f"{way} out {source}", f"{way} in {target}")
                now[target] = sim.add(num_bytes / rings / size / rate, after=after, links=wires)
            before = now
    return sim.run()


@pytest.mark.parametrize(("size", "passes"), [(2, 2), (8, 2), (8, 1), (16, 2), (16, 1)])
def test_collectives_step_by_step(size: int, passes: int) -> None:
    """Pieces of a ring on their wires take what the formula says, latency left aside."""
    num_bytes = 1e12
    kind = "all_reduce" if passes == 2 else "all_gather"
    formula = collective_seconds(HARDWARE.links, Group.of(size, 1, 8), kind, num_bytes)
    assert formula == pytest.approx(ring_seconds(size, 8, num_bytes, passes), rel=1e-3)


def test_tasks_that_wait_in_a_circle_are_reported() -> None:
    sim = Simulation()
    first = sim.add(1.0, "a", after=[])
    sim.tasks[first].missing += 1
    with pytest.raises(RuntimeError, match="1 of 1 tasks wait"):
        sim.run()


def test_a_link_carries_one_message_at_a_time() -> None:
    sim = Simulation()
    for _ in range(3):
        sim.add(1.0, links=("wire",))
    sim.add(1.0, links=("other",))
    assert sim.run() == 3.0
