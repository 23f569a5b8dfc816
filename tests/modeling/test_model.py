"""The language model's interface: state handling, dropout, losses, and messages about wrong shapes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MODELS, WINDOW, no_reset, random_tokens, tiny_model

from longspan.errors import ShapeError, UsageError
from longspan.modeling import state as states
from longspan.modeling.basic import TiledDropout
from longspan.modeling.config import ModelConfig
from longspan.modeling.model import build_model
from longspan.modeling.protocol import refine_reset
from longspan.modeling.state import pack, unpack

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_forward_leaves_the_given_state_alone(name: str) -> None:
    model = tiny_model(name)
    tokens = random_tokens(2, 4 * WINDOW)
    reset = no_reset(model, *tokens.shape)
    reset[:, -1] = True
    state = states.detach(model.init_state(2))
    copies = {path: tensor.clone() for path, tensor in pack(state).items()}
    model(tokens, state, reset=reset)
    decode = model.decode_state(state)
    before = {path: tensor.clone() for path, tensor in pack(decode).items()}
    model.step_tokens(tokens[:, 0], decode)
    assert all(torch.equal(tensor, copies[path]) for path, tensor in pack(state).items())
    assert all(torch.equal(tensor, before[path]) for path, tensor in pack(decode).items())


def test_the_initial_state_does_not_follow_the_optimizer() -> None:
    model = tiny_model("fixed_skip")
    state = model.init_state(1)
    before = state["layer1"]["state"].clone()
    with torch.no_grad():
        model.backbone.layers[1].mixer.recurrent.initial.add_(1.0)
    assert torch.equal(state["layer1"]["state"], before)


@every_model
def test_losses_are_those_of_the_logits(name: str) -> None:
    model = tiny_model(name)
    tokens = random_tokens(2, 3 * WINDOW)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    reset = no_reset(model, *tokens.shape)
    logits, _, _ = model(tokens, model.init_state(2), reset=reset)
    losses, _, aux = model(tokens, model.init_state(2), reset=reset, labels=labels)
    want = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(losses, want.masked_fill(labels == -100, 0.0))
    assert set(aux) == ({"memory_norm"} if "memory" in name else set())


def test_the_auxiliary_loss_is_weighted_and_summed_over_tokens() -> None:
    model = tiny_model("memory")
    tokens = random_tokens(2, 2 * WINDOW)
    reset = no_reset(model, *tokens.shape)
    _, first, one = model(tokens[:, :WINDOW], model.init_state(2), reset=reset[:, :1])
    assert one["memory_norm"].item() == pytest.approx(0.1 * WINDOW * 2 * first["memory"].square().mean().item())
    _, _, two = model(tokens[:, WINDOW:], first, reset=reset[:, 1:])
    _, _, both = model(tokens, model.init_state(2), reset=reset)
    assert both["memory_norm"].item() == pytest.approx(one["memory_norm"].item() + two["memory_norm"].item())
    unweighted = tiny_model("memory", memory={"num_tokens": 2})
    assert unweighted(tokens, unweighted.init_state(2), reset=reset)[2] == {}


@every_model
def test_reset_rows_is_a_new_start_of_those_rows(name: str) -> None:
    model = tiny_model(name)
    tokens = random_tokens(3, 2 * WINDOW)
    reset = no_reset(model, *tokens.shape)
    _, state, _ = model(tokens, model.init_state(3), reset=reset)
    rows = torch.tensor([False, True, False])
    fresh = model.reset_rows(state, rows)
    starts = reset.clone()
    starts[1, 0] = True
    assert torch.equal(model(tokens, fresh, reset=reset)[0], model(tokens, state, reset=starts)[0])
    specs = dict(states.leaves(model.state_spec()))
    recurrent_only = model.reset_rows(state, rows, kinds=("recurrent",))
    for path, tensor in pack(recurrent_only).items():
        source = fresh if specs[path].kind == "recurrent" else state
        assert torch.equal(tensor, pack(source)[path]), path


@every_model
def test_swap_rows_takes_recurrent_states_of_other_rows(name: str) -> None:
    model = tiny_model(name)
    tokens = random_tokens(3, 2 * WINDOW)
    _, state, _ = model(tokens, model.init_state(3), reset=no_reset(model, *tokens.shape))
    permutation = torch.tensor([1, 2, 0])
    specs = dict(states.leaves(model.state_spec()))
    for path, tensor in pack(model.swap_rows(state, permutation)).items():
        old = pack(state)[path]
        assert torch.equal(tensor, old[permutation] if specs[path].kind == "recurrent" else old), path


def test_dropout_has_one_tile_for_all_rows() -> None:
    torch.manual_seed(0)
    dropout = TiledDropout(0.25)
    y = dropout(torch.ones(3, 300, 16))
    assert torch.equal(y, y[:1].expand(3, -1, -1))
    assert torch.equal(y[:, :128], y[:, 128:256]) and torch.equal(y[:, :44], y[:, 256:])
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert 0.15 < (y[0, :128] == 0).float().mean() < 0.35
    assert torch.equal(dropout.eval()(torch.ones(1, 3, 2)), torch.ones(1, 3, 2))


@every_model
def test_dropout_acts_in_training_only(name: str) -> None:
    model = tiny_model(name, dropout=0.3)
    tokens = random_tokens(2, 3 * WINDOW + 1)
    run = lambda: model(tokens, model.init_state(2), reset=no_reset(model, *tokens.shape))[0]  # noqa: E731
    model.eval()
    assert torch.equal(run(), run())
    model.train()
    assert not torch.equal(run(), run())


def test_the_seed_decides_the_parameters() -> None:
    one, two = tiny_model("hybrid"), tiny_model("hybrid")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_initial_spread_of_the_parameters() -> None:
    torch.manual_seed(0)
    layer = {"mixer": "block_recurrent", "gate": "lstm", "mode": "skip", "num_states": 64}
    model = build_model(ModelConfig(vocab_size=64, dim=256, num_heads=8, head_dim=32, ffn_dim=512, layers=[layer]))
    mixer = model.backbone.layers[0].mixer
    spreads = {
        "query.weight": 256**-0.5,
        "output.weight": 512**-0.5,
        "recurrent.initial": 0.1,
        "recurrent.ids": 1.0,
        "position_table": 32**-0.5,
        "recurrent.write.gate.forget_weight": (0.1 / 512) ** 0.5,
        "recurrent.write.gate.forget_bias": 0.1,
    }
    for name, std in spreads.items():
        assert mixer.get_parameter(name).std().item() == pytest.approx(std, rel=0.15), name
    bound = 2 * 256**-0.5 / 0.8796
    assert mixer.query.weight.abs().max() <= bound * 1.001
    assert model.embedding.weight.std().item() == pytest.approx(1.0, rel=0.05)


def test_wrong_shapes_are_named() -> None:
    model = tiny_model("fixed_skip")
    tokens = random_tokens(2, 2 * WINDOW)
    state = model.init_state(2)
    with pytest.raises(ShapeError, match=r"reset is torch.bool \[2, 8\], expected torch.bool \[2, 2\]"):
        model(tokens, state, reset=torch.zeros(2, 8, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"tokens are \[8\], expected \[B, T\]"):
        model(tokens[0], state, reset=no_reset(model, 2, 8))
    with pytest.raises(ShapeError, match=r"layer1.state is \[1, 3, 16\], expected \[2, 3, 16\]"):
        broken = states.tree_map(lambda s: s, state)
        broken["layer1"]["state"] = broken["layer1"]["state"][:1]
        model(tokens, broken, reset=no_reset(model, *tokens.shape))
    with pytest.raises(ShapeError, match="differ from the model's at layer1"):
        model(tokens, {"layer0": state["layer0"]}, reset=no_reset(model, *tokens.shape))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0)])
def test_no_rows_or_no_tokens_are_refused(shape: tuple[int, int]) -> None:
    model = tiny_model("fixed_skip")
    with pytest.raises(ShapeError, match="at least one row and one token"):
        model(random_tokens(2, 8)[: shape[0], : shape[1]], model.init_state(shape[0]), reset=no_reset(model, *shape))


ARCHITECTURES = ("sliding_window", "fixed_skip", "feedback", "memory", "linear_attention", "full_attention")
every_way_in = pytest.mark.parametrize("way_in", ["forward", "advance"])
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_advance_is_the_state_of_forward_and_refuses_what_forward_refuses(name: str) -> None:
    model = tiny_model(name)
    tokens = random_tokens(2, 2 * WINDOW)
    reset, state = no_reset(model, *tokens.shape), model.init_state(2)
    want, found = pack(model(tokens, state, reset=reset)[1]), pack(model.advance(tokens, state, reset=reset))
    assert found.keys() == want.keys() and all(torch.equal(found[path], want[path]) for path in want)
    for rows in (1, 3):
        with pytest.raises(ShapeError, match=rf"state tensor .* is \[{rows}, .* for 2 rows"):
            model.advance(tokens, model.init_state(rows), reset=reset)
    with pytest.raises(ShapeError, match="at least one row and one token"):
        model.advance(tokens[:, :0], state, reset=reset[:, :0])
    with pytest.raises(ShapeError, match=r"tokens are \[8\], expected \[B, T\]"):
        model.advance(tokens[0], state, reset=reset)
    with pytest.raises(ShapeError, match=r"reset is torch.bool \[1, .*expected torch.bool \[2, "):
        model.advance(tokens, state, reset=reset[:1])
    with pytest.raises(ShapeError, match=r"reset is torch.int64 .*expected torch.bool"):
        model.advance(tokens, state, reset=reset.long())


@every_way_in
@every_architecture
def test_state_and_reset_on_another_device_are_named(name: str, way_in: str) -> None:
    model = tiny_model(name)
    tokens = random_tokens(2, 2 * WINDOW)
    reset, state = no_reset(model, *tokens.shape), model.init_state(2)
    with pytest.raises(ShapeError, match=r"reset is on meta, the tokens on cpu\. Move"):
        getattr(model, way_in)(tokens, state, reset=reset.to("meta"))
    with pytest.raises(ShapeError, match=r"state tensor .* is on meta, the tokens on cpu\. Move"):
        getattr(model, way_in)(tokens, states.to(state, "meta"), reset=reset)
    last = list(pack(state))[-1]
    with pytest.raises(ShapeError, match=f"state tensor {last} is on meta"):
        getattr(model, way_in)(tokens, unpack(pack(state) | {last: pack(state)[last].to("meta")}), reset=reset)


@every_architecture
def test_tokens_and_labels_on_another_device_are_named(name: str) -> None:
    model = tiny_model(name)
    tokens = random_tokens(2, 2 * WINDOW)
    reset, state = no_reset(model, *tokens.shape), model.init_state(2)
    with pytest.raises(ShapeError, match=r"labels are on meta, the tokens on cpu\. Move"):
        model(tokens, state, reset=reset, labels=tokens.to("meta"))
    with pytest.raises(ShapeError, match=r"labels are \[2, 7\], tokens \[2, 8\]"):
        model(tokens, state, reset=reset, labels=tokens[:, 1:])
    with pytest.raises(ShapeError, match=r"tokens are on meta, the model on cpu\. Move"):
        model(tokens.to("meta"), states.to(state, "meta"), reset=reset.to("meta"))


@every_architecture
def test_a_step_of_tokens_elsewhere_is_refused(name: str) -> None:
    model = tiny_model(name)
    tokens, state = random_tokens(2, 1)[:, 0], model.decode_state(model.init_state(2))
    with pytest.raises(ShapeError, match=r"tokens are on meta, the model on cpu\. Move"):
        model.step_tokens(tokens.to("meta"), state)
    last = list(pack(state))[-1]
    with pytest.raises(ShapeError, match=f"state tensor {last} is on meta, the tokens on cpu"):
        model.step_tokens(tokens, unpack(pack(state) | {last: pack(state)[last].to("meta")}))
    with pytest.raises(ShapeError, match=r"tokens are \[2, 1\], expected \[B\]"):
        model.step_tokens(tokens[:, None], state)


def test_training_under_autocast() -> None:
    model, tokens = tiny_model("fixed_skip"), random_tokens(2, 2 * WINDOW)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll, _, _ = model(tokens, model.init_state(2), reset=no_reset(model, *tokens.shape), labels=tokens)
    nll.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_an_unknown_kind_of_state_is_refused() -> None:
    model = tiny_model("fixed_skip")
    with pytest.raises(UsageError, match=r"called memory\. Use recurrent, cache"):
        model.reset_rows(model.init_state(1), torch.tensor([True]), kinds=("memory",))


def test_unpack_restores_what_pack_made() -> None:
    state = tiny_model("hybrid").init_state(2)
    assert pack(unpack(pack(state))).keys() == pack(state).keys()
    assert states.tree_map(lambda a, b: torch.equal(a, b), state, unpack(pack(state)))["layer0"]["matrix"] is True


def test_refine_reset_puts_flags_on_the_first_token_of_their_quantum() -> None:
    reset = torch.tensor([[True, False, True]])
    fine = refine_reset(reset, tokens=10, coarse=4, fine=2)
    assert fine.tolist() == [[True, False, False, False, True]]
    assert refine_reset(reset, 10, 4, 4) is reset
