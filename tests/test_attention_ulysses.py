"""A row's tokens on two ranks: the same attention and gradients as on one, the same training too."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_spawned
from toy_models import job, packed_corpus, tiny_folder

from longreach.attention import PATTERNS
from longreach.attention.call import AttentionCall
from longreach.attention.kernels import attend
from longreach.attention.pattern import Heads
from longreach.attention.ulysses import (
    ALONE,
    SequenceRanks,
    SomeHeads,
    attend_in_parts,
    check_heads,
    part_of,
    sequence_ranks,
)
from longreach.infra.launch import run_local
from longreach.infra.resources import Resources

T, D = 24, 8
PATTERN = {
    "causal": {},
    "shifted_sparse": {"group_tokens": 8, "sink_tokens": 2},
    "grouped": {"group_tokens": 6},
}
POSITIONS = torch.cat([torch.arange(10), torch.arange(14)])[None]


def inputs(heads, kv_heads):
    torch.manual_seed(heads)
    shapes = [(1, heads, T, D)] + [(1, kv_heads, T, D)] * 2 + [(1, heads, T, D)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("name", PATTERN)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 6), (12, 6)])
def test_some_heads_are_those_of_the_whole(name, heads, kv_heads):
    """By every kernel that can run here; the shifted half is that of the model, in odd layers too."""
    q, k, v, _ = inputs(heads, kv_heads)
    pattern = PATTERNS[name](**PATTERN[name])
    for layer in (0, 1):
        whole = attend(q, k, v, pattern, POSITIONS, layer=layer)
        for first in range(0, kv_heads, kv_heads // 2):
            kv = slice(first, first + kv_heads // 2)
            own = slice(first * heads // kv_heads, (first + kv_heads // 2) * heads // kv_heads)
            some = SomeHeads(whole=pattern, query=heads, kv=kv_heads, first_kv=first)
            for kernel in ("sdpa", "reference"):
                part = attend(q[:, own], k[:, kv], v[:, kv], some, POSITIONS, kernel=kernel, layer=layer)
                torch.testing.assert_close(part, whole[:, own], atol=1e-12, rtol=0)
    assert len(some.variants(Heads(heads // 2, kv_heads // 2))) == kv_heads // 2


def on_a_rank(todo):
    """Attention of this rank's tokens, and its gradients; {"out": ..., "q": ..., ...}."""
    ranks = sequence_ranks(todo["size"])
    q, k, v, dout = inputs(todo["heads"], todo["kv_heads"])
    sink = torch.linspace(-1, 1, todo["heads"], dtype=torch.float64) if todo["sink"] else None
    part = slice(ranks.rank * T // ranks.size, (ranks.rank + 1) * T // ranks.size)
    mine = [x[:, :, part].clone().requires_grad_() for x in (q, k, v)]
    pattern = PATTERNS[todo["pattern"]](**PATTERN[todo["pattern"]])
    call = AttentionCall(pattern, POSITIONS[:, part], sink, layer=todo["layer"])
    out = attend_in_parts(*mine, call, "auto", ranks)
    grads = torch.autograd.grad(out, mine, dout[:, :, part])
    return {name: x.tolist() for name, x in zip(("out", "q", "k", "v"), (out, *grads), strict=True)}


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "layer", "sink"),
    [("causal", 4, 4, 0, False), ("shifted_sparse", 8, 2, 0, True), ("shifted_sparse", 6, 6, 1, False)],
)
def test_two_ranks_give_the_attention_and_gradients_of_one(tmp_path, name, heads, kv_heads, layer, sink):
    todo = {"size": 2, "heads": heads, "kv_heads": kv_heads, "pattern": name, "layer": layer, "sink": sink}
    parts = run_spawned("test_attention_ulysses:on_a_rank", todo, world=2, folder=tmp_path)
    q, k, v, dout = inputs(heads, kv_heads)
    whole = [x.requires_grad_() for x in (q, k, v)]
    logits = torch.linspace(-1, 1, heads, dtype=torch.float64) if sink else None
    out = attend(*whole, PATTERNS[name](**PATTERN[name]), POSITIONS, logits, layer=layer)
    expected = dict(zip(("out", "q", "k", "v"), (out, *torch.autograd.grad(out, whole, dout)), strict=True))
    for key, value in expected.items():
        got = torch.cat([torch.tensor(part[key], dtype=torch.float64) for part in parts], 2)
        torch.testing.assert_close(got, value.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("pattern", "zero_stage"), [("causal", 3), ("shifted_sparse", 2)])
def test_training_on_parts_of_rows_is_training_on_rows(tmp_path, pattern, zero_stage):
    """Loss, gradient norm and validation loss of each step; float32 sums in another order."""
    attention = {"pattern": pattern} | ({"group_tokens": 8, "sink_tokens": 2} if pattern != "causal" else {})
    tiny_folder(tmp_path / "base")
    packed_corpus(tmp_path, validation=("count39*",))
    some = {"arm": {"tune": "lora+embed+norm", "attention": attention}, "optim": {"validate_every_steps": 3}}
    alone = job(tmp_path, name="alone", **some)
    run_local("longreach.training.loop:train", alone)
    resources = {"workers": 2, "sequence_parallel": 2, "zero_stage": zero_stage}
    parted = job(tmp_path, name="parted", resources=resources, **some)
    run_spawned("longreach.training.loop:train", parted, world=2, folder=tmp_path / "ranks")
    rows = [(Path(todo["out"]) / "metrics.jsonl").read_text().splitlines() for todo in (alone, parted)]
    for one, two in zip(*([json.loads(line) for line in lines] for lines in rows), strict=True):
        assert (one["rows"], one["targets"], one["tokens"]) == (two["rows"], two["targets"], two["tokens"])
        assert one.keys() == two.keys()
        for key in one.keys() & {"loss", "grad_norm", "validation_loss"}:
            assert one[key] == pytest.approx(two[key], rel=2e-5)


def test_what_cannot_be_parted_is_refused_with_both_numbers():
    with pytest.raises(
        ValueError, match="sequence_parallel 2 does not divide the model's 9 query and 3 key/value heads"
    ):
        check_heads(9, 3, 2)
    ids = torch.zeros(1, 15, dtype=torch.long)
    with pytest.raises(ValueError, match="sequence_parallel 2 does not divide rows of 15 tokens"):
        part_of({"input_ids": ids, "position_ids": ids, "labels": ids}, SequenceRanks(None, 2, 0))
    with pytest.raises(ValueError, match="sequence_parallel 2 does not divide workers 3"):
        Resources(workers=3, sequence_parallel=2)
    assert part_of({"input_ids": ids}, ALONE) == {"input_ids": ids}
