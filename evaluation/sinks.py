"""Attention sinks: the share of attention on the first tokens, by layer and head (StreamingLLM,
arXiv:2309.17453, figure 2).

Texts are pieces of held-out documents, each after the model's own first token (BOS or a sink token,
if it has one). The share is averaged over texts and the queries in their second half. The column
`uniform` is the reference: a head that attends evenly puts 1 / (t + 1) on each token at position t.

A mean can hide a few heads that attend almost only to the first token. So heads are counted, too:
Sink^eps_k (arXiv:2410.10781) is the share of heads, over layers and texts, whose mean attention to
token k is above eps, in the first 64 tokens. The rows also have what accompanies a sink in trained
models: the norm of the first token's values is small, and that of its residual stream is large
("Massive Activations", arXiv:2402.17762).

    longreach evaluate MODEL --eval sinks --set lengths=[16,256]

Legend: L layers, H heads, N first tokens, T tokens, B texts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from longreach.evaluation.base import Background, Cell, Count, EvalChoices, Evaluation, Result, Selection
from longreach.evaluation.documents import Document, first_token_id, with_first
from longreach.evaluation.scores import EvalScores, Row, mean_of
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np
    import torch

    from longreach.evaluation.blocks import Figure
    from longreach.evaluation.figures import Style
else:
    np = lazy_module("numpy")

MAPPED = 64
"""Maximum number of tokens in a map that is still readable."""
FIRST_LATE_LAYER = 2
"""First layer of the means in the summary; attention in earlier layers is still local."""
READ_AT_ONCE = 4096
"""Number of tokens in a batch of texts, which has at least one text."""


class Sinks(Evaluation):
    """How much attention goes to the first tokens?"""

    name = "sinks"
    title = "Attention sinks"

    class Choices(EvalChoices):
        """Share of attention on the first tokens, by layer and head (StreamingLLM, figure 2)."""

        lengths: tuple[Count, ...] = Field(default=(16, 256), min_length=1)
        """Lengths of the texts in tokens."""
        texts: int = Field(default=256, ge=1)
        """Number of texts of the shortest length. There are fewer longer texts, so that all lengths
        have about the same number of tokens."""
        first_tokens: int = Field(default=4, ge=1)
        """Number of first tokens whose share of attention is measured."""
        map_layers: tuple[int, ...] = (0, 1, 2, -1)
        """Layers whose attention maps are drawn at the shortest length; -1 is the last layer."""

        @model_validator(mode="after")
        def _fits(self) -> Sinks.Choices:
            shortest = min(self.lengths)
            if shortest <= self.first_tokens:
                raise ValueError(f"lengths {shortest} must be more than first_tokens {self.first_tokens}")
            if self.map_layers and shortest > MAPPED:
                raise ValueError(
                    f"map_layers {list(self.map_layers)}: the shortest length is {shortest} tokens, but maps have at "
                    f"most {MAPPED}: set map_layers=[], or add a shorter length"
                )
            return self

        def selected(self) -> list[Selection]:
            """Return what is needed: any held-out document."""
            return [("lengths", ("*",), ("test", "validation"))]

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each length.

        Raises:
            ValueError: the documents are too short, or a layer does not exist.
        """
        from longreach.evaluation.likelihood import check_attention

        choices = self.choices
        check_attention(self.model)
        layers = self.model.config.num_hidden_layers
        wrong = [layer for layer in choices.map_layers if not -layers <= layer < layers]
        if wrong:
            raise ValueError(f"sinks.map_layers {wrong} do not exist: the model has layers 0 to {layers - 1}")
        cells = []
        for length in choices.lengths:
            texts = pieces(choices, self.documents, length)
            if not texts:
                raise ValueError(f"sinks.lengths {length}: no held-out document has that many tokens")
            self.check_reach(length)
            cells.append({"length": length, "texts": len(texts)})
        return cells

    def measure(self, cell: Cell) -> Result:
        """Return the shares of attention, the counts of heads, norms and maps.

        Returns:
            "first": shares on the first tokens [L, H, N].
            "softmax": shares on the sink in the softmax [L, H].
            "heads": shares of heads by epsilon [L, N].
            "softmax_heads": the same for the sink in the softmax, by epsilon [L].
            "values", "residual": norms [L, 2], of the first token and of all others.
            "maps": attention maps by layer [T, T], only at the shortest length.
        """
        import torch

        from longreach.attention.sink_mass import EPSILONS, attention_mass

        choices, length = self.choices, cell["length"]
        first = first_token_id(self.tokenizer)
        texts = [with_first(ids_T, first)[:length] for ids_T in pieces(choices, self.documents, length)]
        ids_BT = torch.from_numpy(np.stack(texts)).to(self.model.device)
        mapped: list[int] = []
        if length == min(choices.lengths):
            mapped = sorted({layer % self.model.config.num_hidden_layers for layer in choices.map_layers})
        masses = []
        weights = []
        for part_BT in ids_BT.split(max(1, READ_AT_ONCE // length)):
            masses.append(attention_mass(self.model, part_BT, first_tokens=choices.first_tokens, map_layers=mapped))
            weights.append(len(part_BT) / len(ids_BT))
        tokens = range(choices.first_tokens)
        heads, softmax_heads = {}, {}
        for epsilon in EPSILONS:
            by_token = [torch.stack([mass.heads_L(epsilon, token) for token in tokens], -1) for mass in masses]
            heads[str(epsilon)] = _weighted(by_token, weights)
            softmax_heads[str(epsilon)] = _weighted([mass.softmax_heads_L(epsilon) for mass in masses], weights)
        return {
            "first": _weighted([mass.first_LHN for mass in masses], weights),
            "softmax": _weighted([mass.softmax_LH for mass in masses], weights),
            "heads": heads,
            "softmax_heads": softmax_heads,
            "values": _weighted([mass.values_L2 for mass in masses], weights),
            "residual": _weighted([mass.residual_L2 for mass in masses], weights),
            "maps": {str(layer): _weighted([mass.maps[layer] for mass in masses], weights) for layer in mapped},
        }

    @classmethod
    def scores(cls, choices: Choices, results: list[tuple[Cell, Result]]) -> EvalScores:
        """Return rows of kind `layer` (means over heads), `head` (by length, layer and head) and
        `map` (by layer, query and key)."""
        heads: list[Row] = []
        layers: list[Row] = []
        maps: list[Row] = []
        summary: dict[str, float] = {}
        for cell, result in results:
            length, first_LHN = cell["length"], np.array(result["first"])
            for layer, (first_HN, softmax_H) in enumerate(zip(first_LHN, result["softmax"], strict=True)):
                place = {"length": length, "texts": cell["texts"], "layer": layer}
                rows = head_rows(place, first_HN, softmax_H)
                heads += rows
                layers.append(layer_row(place, rows) | norm_columns(result, layer))
                if length == max(choices.lengths):  # in a short text, even uniform attention gives the first token much
                    layers[-1] |= head_columns(result, layer)
            late_LHN = first_LHN[FIRST_LATE_LAYER:] if len(first_LHN) > FIRST_LATE_LAYER else first_LHN
            summary[f"first_token_mass_{length}"] = float(late_LHN[..., 0].mean())
            if length == max(choices.lengths):
                summary |= head_shares(result)
            for layer, map_TT in result["maps"].items():
                maps += map_rows(length, int(layer), map_TT)
        return EvalScores(
            eval=cls.name,
            protocol="means over texts and the queries of their second half; the summary is that from layer "
            f"{FIRST_LATE_LAYER} on",
            recipe=choices.model_dump(mode="json"),
            rows=layers + heads + maps,
            summary=summary,
            note="A sink says where attention that is not needed goes, not that the first tokens matter.",
        )

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return figures of the attention on the first token and of its norms by layer for all
        models, then figures by head and maps for each model."""
        figures = [_layers_figure(length, models, style) for length in _lengths(models)]
        figures += _norm_figures(models, style)
        for name, scores in models.items():
            figures.append(_heads_figure(name, scores))
            for layer in scores.distinct("layer", kind="map"):
                figures.append(_map_figure(name, layer, scores.rows_with(kind="map", layer=layer)))
        return figures


def pieces(choices: Sinks.Choices, documents: list[Document], length: int) -> list[np.ndarray]:
    """Return texts of `length` tokens, taken from all documents in turn, as many as `texts` allows
    for this length."""
    wanted = max(1, choices.texts * min(choices.lengths) // length)
    taken: list[np.ndarray] = []
    start = 0
    while len(taken) < wanted:
        reached = False
        for document in documents:
            ids_T = document.ids_T[start : start + length]
            if len(ids_T) == length:
                taken.append(ids_T)
                reached = True
        if not reached:
            break
        start += length
    return taken[:wanted]


def _weighted(parts: list[torch.Tensor], weights: list[float]) -> Any:
    """Return the weighted sum of tensors as nested lists."""
    total = sum(part * weight for part, weight in zip(parts, weights, strict=True))
    return total.tolist()  # type: ignore[union-attr]


def head_rows(place: Row, first_HN: np.ndarray, softmax_H: list[float]) -> list[Row]:
    """Return a row for each head of a layer: the share of attention on each first token, and on the
    sink in the softmax."""
    length = place["length"]
    queries = np.arange(length // 2, length)
    uniform = float((1 / (queries + 1)).mean())
    rows = []
    for head, (first_N, softmax) in enumerate(zip(first_HN, softmax_H, strict=True)):
        row = {"kind": "head", **place, "head": head, "first_token": float(first_N[0]), "uniform": uniform}
        for n, mass in enumerate(first_N):
            row[f"token_{n}"] = float(mass)
        row["softmax_sink"] = float(softmax)
        rows.append(row)
    return rows


def layer_row(place: Row, heads: list[Row]) -> Row:
    """Return the means over a layer's heads."""
    means: Row = {}
    for column in heads[0]:
        if column not in ("kind", "head"):
            means[column] = mean_of(heads, column)
    return means | {"kind": "layer", **place}


def norm_columns(result: Result, layer: int) -> Row:
    """Return the norms of the first token's value and residual stream in a layer, and the means over
    all other tokens."""
    row: Row = {}
    for name in ("values", "residual"):
        row[f"{name}_first"], row[f"{name}_others"] = result[name][layer]
    return row


def head_columns(result: Result, layer: int) -> Row:
    """Return the shares of a layer's heads whose attention to the first token, or to the sink in the
    softmax, is above each epsilon."""
    row: Row = {}
    for epsilon, heads_LN in result["heads"].items():
        row[f"heads_{epsilon}"] = heads_LN[layer][0]
        row[f"softmax_heads_{epsilon}"] = result["softmax_heads"][epsilon][layer]
    return row


def head_shares(result: Result) -> dict[str, float]:
    """Return Sink^eps_k over all layers: `sink_0.3_1` for the first token, `sink_0.3_softmax` for the
    sink logit."""
    shares = {}
    for epsilon, heads_LN in result["heads"].items():
        for n, share in enumerate(np.mean(heads_LN, axis=0), start=1):
            shares[f"sink_{epsilon}_{n}"] = float(share)
        if any(result["softmax_heads"][epsilon]):
            shares[f"sink_{epsilon}_softmax"] = float(np.mean(result["softmax_heads"][epsilon]))
    return shares


def map_rows(length: int, layer: int, map_TT: list[list[float]]) -> list[Row]:
    """Return a row for each pair (query, key) of a causal layer."""
    rows = []
    for query, masses in enumerate(map_TT):
        for key, mass in enumerate(masses[: query + 1]):
            rows.append({"kind": "map", "length": length, "layer": layer, "query": query, "key": key, "mass": mass})
    return rows


def _lengths(models: dict[str, EvalScores]) -> list[int]:
    """Return the lengths of texts at which any of the models was measured."""
    lengths: set[int] = set()
    for scores in models.values():
        lengths.update(scores.distinct("length", kind="layer"))
    return sorted(lengths)


def _layers_figure(length: int, models: dict[str, EvalScores], style: Style) -> Figure:
    """Draw the attention on the first token by layer, with a curve for each model."""
    from longreach.evaluation.figures import lines

    curves = {}
    even = 0.0
    for name, scores in models.items():
        rows = scores.rows_with(kind="layer", length=length)
        if rows:
            curves[name] = [(row["layer"], row["first_token"]) for row in rows]
            even = rows[0]["uniform"]
    title = f"Attention on the first token, texts of {length:,} tokens"
    caption = f"Even attention would give the first token {even:.3f}. A layer far above that uses it as a sink."
    return lines(f"sinks-{length}.png", title, caption, ("layer", "share of attention"), curves, style)


def _norm_figures(models: dict[str, EvalScores], style: Style) -> list[Figure]:
    """Draw the ratio of the first token's norms to those of other tokens by layer, with a curve for
    each model, at its longest length."""
    from longreach.evaluation.figures import lines

    figures = []
    told = {
        "values": "Below 1: attention on the first token contributes less than on other tokens, as for a sink.",
        "residual": "Far above 1: massive activations, which accompany a sink.",
    }
    for norm, caption in told.items():
        curves = {}
        for name, scores in models.items():
            by_length: dict[int, list[Row]] = {}
            for row in scores.rows_with(kind="layer"):
                if f"{norm}_first" in row:  # scores of earlier versions have none
                    by_length.setdefault(row["length"], []).append(row)
            if by_length:
                rows = by_length[max(by_length)]
                curves[name] = [(row["layer"], row[f"{norm}_first"] / row[f"{norm}_others"]) for row in rows]
        if curves:
            title = f"Norm of the first token's {norm}, relative to other tokens"
            figures.append(lines(f"sinks-{norm}.png", title, caption, ("layer", "ratio"), curves, style, log=True))
    return figures


def _heads_figure(name: str, scores: EvalScores) -> Figure:
    """Draw the attention on the first token by layer and head, at the shortest length."""
    from longreach.evaluation.figures import grid

    shortest = min(scores.distinct("length", kind="head"))
    heads: dict[str, list[tuple[float, str]]] = {}
    for row in scores.rows_with(kind="head", length=shortest):
        mass = row["first_token"]
        heads.setdefault(f"head {row['head']}", []).append((mass, f"{mass:.2f}"))
    return grid(
        f"sinks-{name}.png",
        f"Attention on the first token by head: {name}",
        f"Texts of {shortest:,} tokens. Dark: the head attends mostly to the first token.",
        ("layer", "share of attention"),
        list(map(str, scores.distinct("layer", kind="head", length=shortest))),
        heads,
        1.0,
    )


def _map_figure(name: str, layer: int, rows: list[Row]) -> Figure:
    """Draw the attention map of a layer, the mean over heads and texts."""
    from longreach.evaluation.figures import grid

    tokens = rows[0]["length"]
    masses = {(row["query"], row["key"]): row["mass"] for row in rows}
    queries = {}
    for query in range(tokens):
        queries[str(query)] = [(masses.get((query, key), math.nan), "") for key in range(tokens)]
    return grid(
        f"sinks-{name}-layer-{layer}.png",
        f"Attention of layer {layer}: {name}",
        "A dark column is a token to which all later tokens attend: a sink.",
        ("key", "share of attention"),
        list(map(str, range(tokens))),
        queries,
        1.0,
        "query",
    )
