"""What becomes of the sums: sources, places in the document, whole documents, each against arithmetic by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from oracles import PLAN, Oracle, documents, gaining_oracle, scores_of

from longspan.trainer.evaluation.result import summarise
from longspan.trainer.evaluation.scorer import Scorer
from longspan.trainer.evaluation.spec import EvaluationSpec
from longspan.trainer.evaluation.windows import POSITION, bucket_edges, shares

SPEC = EvaluationSpec(name="test", context_tokens=PLAN.context_tokens, bootstrap_samples=200)
LN2 = math.log(2)


def test_places_are_a_balanced_panel_of_means_over_documents() -> None:
    docs = documents(lengths=(400, 330, 1100), token_bytes=(1, 2, 4))
    scores = scores_of(gaining_oracle(), docs=docs)
    position = summarise(scores, docs, SPEC, 16)["position"]
    # half of three documents are two: 400 and 1,100 tokens fill [128, 256), all three do; none but one fills more
    assert position["num_documents"] == 3
    assert [(b["first"], b["last"]) for b in position["buckets"]] == [(2**k, 2 ** (k + 1) - 1) for k in range(8)]
    for k, bucket in enumerate(position["buckets"]):
        found = [score for score in scores if score.mode == POSITION and score.span == k]
        assert bucket["bits_per_byte"] == pytest.approx(sum(s.nats / s.bytes for s in found) / 3 / LN2, abs=1e-12)
        assert bucket["nats_per_token"] == pytest.approx(sum(s.nats / s.tokens for s in found) / 3, abs=1e-12)
        assert bucket["tokens"] == 3 * 2**k and bucket["ci_low"] <= bucket["bits_per_byte"] <= bucket["ci_high"]


def test_a_document_that_ends_early_leaves_the_panel_and_not_a_bucket() -> None:
    docs = documents(lengths=(300, 2100, 2200))
    position = summarise(scores_of(gaining_oracle(), docs=docs), docs, SPEC, 16)["position"]
    assert position["num_documents"] == 2 and position["buckets"][-1]["last"] == 2047
    assert all(bucket["tokens"] == 2 * (bucket["last"] + 1 - bucket["first"]) for bucket in position["buckets"])


def test_buckets_cover_every_token_but_bos_once() -> None:
    for size in (2, 3, 4, 5, 17, 128, 129):
        edges = bucket_edges(size)
        assert [place for a, b in edges for place in range(a, b)] == list(range(1, size))


def test_whole_documents_are_sums_over_all_tokens_and_words() -> None:
    docs = documents(token_bytes=(1, 2, 5), words=(10, 20, 30))
    scores = scores_of(gaining_oracle(), docs=docs)
    whole = summarise(scores, docs, SPEC, 16)["whole"]
    nats = math.fsum(score.nats for score in scores if score.mode == POSITION)
    assert (whole["tokens"], whole["bytes"]) == (399 + 329 + 509, 399 + 2 * 329 + 5 * 509)
    assert whole["complete"] and whole["words"] == 60
    assert whole["perplexity_per_word"] == pytest.approx(math.exp(nats / 60), rel=1e-12)
    assert whole["bits_per_byte"] == pytest.approx(nats / whole["bytes"] / LN2, abs=1e-12)
    headed = documents(words=(10, None, 30))
    assert summarise(scores_of(gaining_oracle(), docs=headed), headed, SPEC, 16)["whole"]["words"] is None


def test_sources_are_measured_apart_and_one_document_has_no_interval() -> None:
    docs = documents(token_bytes=(1, 2, 5), sources=("books", "code", "books"))
    scores = scores_of(gaining_oracle(), docs=docs)
    result = summarise(scores, docs, SPEC, 16)
    assert sorted(result["by_source"]) == ["books", "code"]
    for source, members in (("books", (0, 2)), ("code", (1,))):
        part = result["by_source"][source]
        mine = [s for s in scores if s.mode == "carried" and s.document in members]
        wanted = math.fsum(s.nats for s in mine) / sum(s.bytes for s in mine) / LN2
        assert part["carried"]["bits_per_byte"] == pytest.approx(wanted, abs=1e-12)
        assert part["num_documents"] == len(members)
        assert (part["memory_gain"]["ci_low"] is None) == (source == "code")
    total = sum(part["target_bytes"] for part in result["by_source"].values())
    assert total == result["target_bytes"]


def test_ranks_share_the_documents_and_their_work() -> None:
    docs = documents(lengths=(400, 330, 510, 2000, 420, 350))
    for ranks in (1, 2, 3, 8):
        parts = shares(docs, PLAN, ranks)
        assert len(parts) == ranks and sorted(d for part in parts for d in part) == list(range(6))
    assert all(parts for parts in shares(docs, PLAN, 2))


class Counting(Oracle):
    """Knows how many tokens went into the model, and into its largest call."""

    def __init__(self) -> None:
        super().__init__(lambda context: 2.0 + 0 * context)
        self.tokens, self.largest, self.shapes = 0, 0, set[int]()

    def __call__(self, tokens, state, *, reset, labels=None):  # type: ignore[no-untyped-def]
        self.tokens, self.largest = self.tokens + tokens.numel(), max(self.largest, tokens.numel())
        found = super().__call__(tokens, state, reset=reset, labels=labels)
        self.shapes.add(sum(leaf.numel() for group in found[1].values() for leaf in group.values()) // len(tokens))
        return found


def test_cost_is_linear_in_the_length_and_a_call_never_grows() -> None:
    plan = replace(PLAN, modes=("carried", "state_reset"), reset_tokens=(16,), batch_tokens=2048)
    cost = []
    for length in (20_000, 40_000, 80_000):
        model = Counting()
        Scorer(model, documents(lengths=(length, length - 7)), plan).run()  # type: ignore[arg-type]
        assert model.largest <= 2048 and len(model.shapes) == 1  # the state is as large at the end as at the start
        cost.append(model.tokens)
    assert cost[1] - cost[0] == pytest.approx(40_000, abs=4096) and cost[2] - cost[1] == pytest.approx(80_000, abs=4096)


def test_a_window_longer_than_a_call_costs_its_length() -> None:
    plan = replace(PLAN, modes=("truncated", "carried"), context_tokens=(8192,), batch_tokens=512, stride_tokens=48)
    model = Counting()
    docs = documents(lengths=(9000, 9000), first=8400)
    Scorer(model, docs, plan).run()  # type: ignore[arg-type]
    assert model.largest <= 512
    assert model.tokens == pytest.approx(2 * 9000 + 4 * (8192 + 48 + 16 + 48), rel=0.02)


def test_documents_scored_in_parts_give_the_same_scores() -> None:
    docs = documents()
    whole = scores_of(gaining_oracle(), docs=docs)
    parts = [
        score
        for share in shares(docs, PLAN, 3)
        for score in Scorer(gaining_oracle(), docs, PLAN, only=share).run()  # type: ignore[arg-type]
    ]
    assert sorted(parts, key=lambda score: score.key) == whole
