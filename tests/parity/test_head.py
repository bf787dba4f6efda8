"""The chunked LM head against plain log-softmax."""

import itertools

import pytest
import torch

from tests.parity.conftest import Bases, Folders, load
from tests.parity.reference import SPECS, warm
from tinsmith.models import head
from tinsmith.models.loading import BaseModel
from tinsmith.models.lora import Segment

ROWS = 45


TRAINED, FROZEN = ("all", "attention", "unembedding"), ("attention", "attention", "attention")
"""Adapters of which some change the head, or none."""


def segments_of(model: BaseModel, kinds: tuple[str, ...] = TRAINED) -> list[Segment]:
    adapters = [model.new_adapter(SPECS[name]) for name in kinds]
    for adapter in adapters:
        warm(adapter)
        adapter.require_grad()
    bounds = [0, 7, 20, 21, ROWS]
    return [Segment(a, *span) for a, span in zip([*adapters, None], itertools.pairwise(bounds), strict=True)]


def with_spare_columns(model: BaseModel) -> BaseModel:
    """As on a GPU."""
    model.spare_columns = head.SpareColumns(model.module.get_output_embeddings().weight)
    return model


def plain_logits(model: BaseModel, hidden_TD: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
    """As by autograd, with `leaves` for the adapters that change the head."""
    parts = []
    for segment in segments:
        rows = hidden_TD[segment.start : segment.end]
        logits = rows @ model.module.lm_head.weight.T
        if segment.adapter and (pair := segment.adapter.pair(model.head_linear)):
            segment.adapter.leaves = [leaf.clone().requires_grad_() for leaf in pair]  # type: ignore[attr-defined]
            a, b = segment.adapter.leaves  # type: ignore[attr-defined]
            logits = logits + segment.adapter.scale * (rows @ a.T) @ b.T
        parts.append(logits)
    return torch.cat(parts)


@pytest.mark.parametrize("rows_per_chunk", [8, 11, 1000])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kinds", [TRAINED, FROZEN], ids=["trained", "frozen"])
@pytest.mark.parametrize("spare", [False, True], ids=["plain", "spare columns"])
def test_target_logprobs_and_all_gradients_equal_log_softmax(
    rows_per_chunk: int,
    several: bool,
    kinds: tuple[str, ...],
    spare: bool,
    bases: Bases,
    folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_spare_columns(load(folders("qwen3-untied"))) if spare else bases("qwen3-untied")
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", rows_per_chunk * model.vocab_size)
    torch.manual_seed(0)
    segments = segments_of(model, kinds)
    hidden_TD = torch.randn(ROWS, 32, requires_grad=True)
    rows_M = torch.arange(2, ROWS).repeat_interleave(3)[4:] if several else torch.arange(ROWS)
    targets_M = torch.randint(model.vocab_size, (len(rows_M),))
    upstream_M = torch.randn(len(rows_M))
    logprobs_M = head.target_logprobs(model, hidden_TD, segments, rows_M if several else None, targets_M)
    [gradient] = torch.autograd.grad(logprobs_M, hidden_TD, upstream_M)

    expected_M = plain_logits(model, hidden_TD, segments).log_softmax(1)[rows_M, targets_M]
    torch.testing.assert_close(logprobs_M, expected_M, atol=1e-5, rtol=1e-5)
    expected_M.backward(upstream_M)
    torch.testing.assert_close(gradient, hidden_TD.grad, atol=1e-5, rtol=1e-5)
    for segment in (segment for segment in segments if hasattr(segment.adapter, "leaves")):
        pairs = zip(segment.adapter.grad_pair(model.head_linear), segment.adapter.leaves, strict=True)
        for total, leaf in pairs:
            torch.testing.assert_close(total, leaf.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kinds", [TRAINED, FROZEN], ids=["trained", "frozen"])
def test_a_rows_bits_do_not_depend_on_how_many_targets_other_rows_have(kinds: tuple[str, ...], bases: Bases) -> None:
    model = bases("qwen3-untied")
    torch.manual_seed(0)
    hidden_TD, targets_T = torch.randn(ROWS, 32), torch.randint(model.vocab_size, (ROWS,))
    upstream_T = torch.randn(ROWS)
    counts = torch.ones(ROWS, dtype=torch.int64)
    counts[20:] = 3
    rows_M = torch.arange(ROWS).repeat_interleave(counts)
    gradients = []
    for rows in (None, rows_M):
        segments, leaf_TD = segments_of(model, kinds), hidden_TD.clone().requires_grad_()
        chosen = torch.arange(ROWS) if rows is None else rows
        logprobs_M = head.target_logprobs(model, leaf_TD, segments, rows, targets_T[chosen])
        logprobs_M.backward(upstream_T[chosen])
        gradients.append([leaf_TD.grad[:20], segments[0].adapter.grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_without_autograd_no_gradient_is_prepared(bases: Bases) -> None:
    model = bases("qwen3-untied")
    hidden_TD = torch.randn(ROWS, 32, requires_grad=True)
    with torch.no_grad():
        logprobs_T = head.target_logprobs(model, hidden_TD, segments_of(model, FROZEN), None, torch.arange(ROWS))
    assert not logprobs_T.requires_grad


def test_a_chunk_never_holds_more_logits_than_allowed(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bases("qwen3-untied")
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 10 * model.vocab_size)
    chunks = list(head._head(model, segments_of(model), None).chunks(ROWS))
    assert max(end - start for start, end in chunks) == 10
    assert chunks[0][0] == 0
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(chunks))
    assert chunks[-1][1] == ROWS


def test_how_a_segments_gradient_is_summed_does_not_depend_on_what_comes_before_it(
    bases: Bases, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bases("qwen3-untied")
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 16 * model.vocab_size)
    torch.manual_seed(0)
    hidden_TD, targets_T = torch.randn(50, 32), torch.randint(model.vocab_size, (50,))
    gradients = []
    for before in (0, 3, 9, 15, 16):
        adapter = model.new_adapter(SPECS["all"])
        warm(adapter)
        adapter.require_grad()
        strangers = [Segment(None, 0, before)] if before else []
        rows = torch.cat([torch.randn(before, 32), hidden_TD]).requires_grad_()
        targets = torch.cat([torch.zeros(before, dtype=torch.int64), targets_T])
        segments = [*strangers, Segment(adapter, before, before + 50)]
        head.target_logprobs(model, rows, segments, None, targets)[before:].sum().backward()
        gradients.append(adapter.grad)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_the_samplers_logits_are_the_trainers(bases: Bases) -> None:
    model = bases("qwen3-tied")
    segments = segments_of(model)
    hidden_TD = torch.randn(ROWS, 32)
    targets_T = torch.randint(model.vocab_size, (ROWS,))
    logprobs_TV = head.logits(model, hidden_TD, segments).log_softmax(1)
    logprobs_T = head.target_logprobs(model, hidden_TD, segments, None, targets_T)
    torch.testing.assert_close(logprobs_TV[torch.arange(ROWS), targets_T], logprobs_T, atol=1e-5, rtol=1e-5)


def test_low_precision_weights_give_float32_logits(bases: Bases) -> None:
    hidden_CD, weight_VD = torch.randn(9, 32).bfloat16(), torch.randn(20000, 32).bfloat16()
    logits = head.full_product(hidden_CD, weight_VD)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden_CD.float() @ weight_VD.float().T, atol=1e-5, rtol=1e-5)


def test_an_adapter_beside_the_weight_leaves_nothing_behind(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = with_spare_columns(load(folders("qwen3-tied"))), load(folders("qwen3-tied"))
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 8 * model.vocab_size)
    broken, sound = (model.new_adapter(SPECS["all"]) for _ in range(2))
    warm(sound)
    broken.weights.fill_(float("nan"))
    hidden_TD = torch.randn(24, 32)
    segments = [Segment(broken, 0, 8), Segment(sound, 8, 16), Segment(None, 16, 24)]
    targets_T = torch.arange(24)
    ours, theirs = (head.target_logprobs(each, hidden_TD, segments, None, targets_T) for each in (model, plain))
    assert ours[:8].isnan().all()
    torch.testing.assert_close(ours[8:], theirs[8:], atol=1e-6, rtol=0)
    assert torch.equal(model.module.model.embed_tokens.weight, plain.module.model.embed_tokens.weight)
    assert torch.equal(model.full_copy(trainable=False).lm_head.weight, plain.module.lm_head.weight)
