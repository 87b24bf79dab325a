"""Check that a model's tokens see neither later tokens nor other documents.

If tokens see the future, the training loss falls and the evaluation loss rises, and no loss curve
shows why. Most copies of S²-Attn have such a leak: a roll by half a group puts the row's end and
its start into one causal group. So this tests the model itself, whatever computes its attention, in
two independent ways:

  output    replace the tokens from a cut to the end of their document; no hidden state elsewhere may change
  gradient  take the last hidden states from a document's start to a cut; no embedding elsewhere may have a gradient

Each test is done at many cuts, in a row of one document and in a row of three packed documents
(position_ids restart).

    longreach verify-attention MODEL
    for leak in verify_attention(model, tokens=64): print(leak)

Legend: B rows, T tokens, E width, C cuts.
"""

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ROWS = 8
"""Perturbed rows in a forward pass, in addition to the unperturbed row for comparison."""
GRADIENT_CUTS = 8
"""Cuts with one backward pass each. Every pair of tokens with a cut between them is tested."""


@dataclass(frozen=True)
class Leak:
    """A token that sees what it must not: the worst one of its kind and layer."""

    kind: str
    """"future" (a later token of its document) or "document" (a token of another document)."""
    packed: bool
    """Whether the row had several documents."""
    found_by: str
    """The test that found it: "output" or "gradient"."""
    layer: int | None
    """The first layer after which hidden states change; None for "gradient", which tests all layers
    together."""
    token: int
    sees: tuple[int, int]
    """First and last of the replaced tokens, or the token with the largest gradient, twice."""
    change: float
    """Largest change of a hidden state, relative to the largest hidden state; for "gradient" the
    same of gradients."""
    tokens: int
    """Number of tokens in the row with such a leak."""

    def __str__(self) -> str:
        where = "across all layers" if self.layer is None else f"in layer {self.layer}"
        first, last = self.sees
        what = f"token {first}" if first == last else f"tokens {first}..{last}"
        whose = "later" if self.kind == "future" else "of another document"
        row = "packed row" if self.packed else "row of one document"
        return (
            f"LEAK ({self.kind}, by {self.found_by}) {where}: token {self.token} sees {what}, {whose}, in a {row}; "
            f"{self.tokens} tokens do so, by up to {self.change:.1e} of the greatest value"
        )


@dataclass(frozen=True)
class Row:
    """A row of documents, given by their borders 0, ..., T."""

    edges: tuple[int, ...]

    @property
    def position_ids_T(self) -> Tensor:
        return torch.cat([torch.arange(b - a) for a, b in zip(self.edges, self.edges[1:], strict=False)])

    def document(self, token: int) -> tuple[int, int]:
        """Return where a token's document begins and ends."""
        n = bisect(self.edges, token)
        return self.edges[n - 1], self.edges[n]

    def cuts(self, count: int) -> list[int]:
        """Return the tokens at which to cut: document starts, the last token, and about `count`
        evenly spaced ones."""
        T = self.edges[-1]
        return sorted({*self.edges[:-1], T - 1, *torch.linspace(1, T - 1, min(count, T - 1)).long().tolist()})


def verify_attention(model: nn.Module, *, tokens: int = 64, packed: bool = True, cuts: int = 64) -> list[Leak]:
    """Return the leaks found; none if each token sees only what is before it in its document.

    Raises ValueError for fewer than 8 tokens, or for hidden states that are not finite.

    Args:
        model: a causal transformers model (or PEFT around one), with any attention. Its weights and
            mode do not change.
        tokens: tokens in the row. Use several groups or windows of the model's pattern, and a
            multiple of the group size if the pattern requires it.
        packed: also test documents packed into one row, separated by position_ids that restart.
        cuts: number of perturbed places. The output test covers every pair of tokens with a cut
            between them.
    """
    if tokens < 8:
        raise ValueError(f"{tokens} tokens are too few to pack three documents: use at least 8")
    body = next(m for m in model.modules() if isinstance(m, PreTrainedModel)).base_model
    assert isinstance(body, PreTrainedModel), "a transformers model is its own base_model or contains it"
    rows = [Row((0, tokens))] + [Row((0, tokens // 3 + 1, tokens * 3 // 4, tokens))] * packed
    was_training = body.training
    body.eval()
    try:
        leaks = []
        for row in rows:
            leaks += _by_output(body, row, cuts)
            leaks += _by_gradient(body, row)
        return leaks
    finally:
        body.train(was_training)


@torch.no_grad()
def _by_output(body: PreTrainedModel, row: Row, count: int) -> list[Leak]:
    """Replace the tokens from each cut to the end of its document, and find what else changes."""
    vocabulary = len(body.get_input_embeddings().weight)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(vocabulary, (row.edges[-1],), generator=generator)
    others_T = (ids_T + torch.randint(1, vocabulary, ids_T.shape, generator=generator)) % vocabulary
    worst: dict[str, Leak] = {}
    for some in torch.tensor(row.cuts(count)).split(ROWS):
        replaced = [(cut, row.document(cut)[1]) for cut in some.tolist()]
        ids_BT = ids_T.repeat(1 + len(replaced), 1)
        for n, (cut, end) in enumerate(replaced):
            ids_BT[n + 1, cut:end] = others_T[cut:end]
        hidden = _hidden_states(body, row, input_ids=ids_BT.to(body.device))
        for leak in _moved(hidden, row, replaced):
            known = worst.get(leak.kind)
            if known is None or (leak.layer, -leak.change) < (known.layer, -known.change):
                worst[leak.kind] = leak
    return list(worst.values())


def _moved(hidden: tuple[Tensor, ...], row: Row, replaced: list[tuple[int, int]]) -> Iterator[Leak]:
    """Yield, for each perturbed row, its leaks in the first layer that has one. hidden: [1+C, T, E]
    after each layer."""
    moved_LCT = torch.stack([(h[1:] - h[:1]).abs().amax(-1) / h.abs().max() for h in hidden[1:]]).float().cpu()
    tolerance = 16 * torch.finfo(hidden[0].dtype).eps  # sums in blocks of other rows may round differently
    for n, (cut, end) in enumerate(replaced):
        moved_LCT[:, n, cut:end] = 0
        start = row.document(cut)[0]
        same_T = torch.zeros(moved_LCT.shape[2], dtype=torch.bool)
        same_T[start:end] = True
        for kind, where_T in (("future", same_T), ("document", ~same_T)):
            moved_LT = moved_LCT[:, n] * where_T
            layers = (moved_LT > tolerance).any(1).nonzero()
            if len(layers):
                layer = int(layers[0])
                change, token = moved_LT[layer].max(0)
                count = int((moved_LT[layer] > tolerance).sum())
                sees, packed = (cut, end - 1), len(row.edges) > 2
                yield Leak(kind, packed, "output", layer, int(token), sees, float(change), count)


def _by_gradient(body: PreTrainedModel, row: Row) -> list[Leak]:
    """Find which embeddings have a gradient from hidden states between a document's start and a
    cut."""
    generator = torch.Generator().manual_seed(1)
    table: Tensor = body.get_input_embeddings().weight  # type: ignore[assignment]
    ids_T = torch.randint(len(table), (row.edges[-1],), generator=generator)
    embeds_1TE = table.detach()[ids_T.to(table.device)][None].requires_grad_()
    with torch.enable_grad():
        last_TE = _hidden_states(body, row, inputs_embeds=embeds_1TE)[-1][0]
        weights_TE = torch.randn(last_TE.shape, generator=generator).to(last_TE)
        terms_T = (last_TE * weights_TE).sum(-1)
    worst: dict[str, Leak] = {}
    for cut in row.cuts(GRADIENT_CUTS)[1:]:
        start, end = row.document(cut - 1)
        (grad_1TE,) = torch.autograd.grad(terms_T[start:cut].sum(), embeds_1TE, retain_graph=True)
        grad_T = grad_1TE[0].abs().amax(-1).float().cpu()
        if not 0 < float(grad_T.max()) < torch.inf:
            raise ValueError(f"{type(body).__name__}: largest gradient {float(grad_T.max())}: nothing can be compared")
        grad_T = grad_T / grad_T.max()
        for kind, where in (("future", slice(cut, end)), ("document", None)):
            part_T = torch.zeros_like(grad_T)
            if where is not None:
                part_T[where] = grad_T[where]
            else:
                part_T[:start], part_T[end:] = grad_T[:start], grad_T[end:]
            change, source = part_T.max(0)
            if change > 1e-6 and (kind not in worst or change > worst[kind].change):
                sees, packed = (int(source), int(source)), len(row.edges) > 2
                worst[kind] = Leak(
                    kind, packed, "gradient", None, cut - 1, sees, float(change), int((part_T > 1e-6).sum())
                )
    return list(worst.values())


def _hidden_states(body: PreTrainedModel, row: Row, **inputs: Tensor) -> tuple[Tensor, ...]:
    """Return embeddings and the hidden states after each layer, [B, T, E] each. ValueError unless
    all are finite."""
    batch = next(iter(inputs.values())).shape[0]
    positions_BT = row.position_ids_T.to(body.device).expand(batch, -1)
    hidden = body(**inputs, position_ids=positions_BT, use_cache=False, output_hidden_states=True).hidden_states
    if not all(bool(h.isfinite().all()) for h in hidden):
        raise ValueError(f"{type(body).__name__} has hidden states that are not finite: nothing can be compared")
    return hidden
