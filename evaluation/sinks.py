"""Where attention rests: the mass on first tokens, by layer and head (StreamingLLM,
arXiv:2309.17453, figure 2).

Texts are pieces of held-out documents, each read from its own first token on (BOS or a sink token,
if the model has one). Mass is averaged over texts and the queries of their second half; a head that
spread its attention evenly would put 1 / (t + 1) on each token at position t, whose mean is the
column `uniform`.

A mean hides a few heads that rest there altogether. So heads are counted, too: Sink^eps_k
(arXiv:2410.10781) is the share of heads, over layers and texts, whose mean attention to token k is
above eps, in the first 64 tokens. Beside it stands what goes with a sink in trained models: the
first token's values are small, and its residual stream is long ("Massive Activations",
arXiv:2402.17762).

    longreach evaluate MODEL --eval sinks --set lengths=[16,256]

Legend: L layers, H heads, N first tokens, T tokens, B texts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field

from longreach.evaluation.base import Background, Cell, Count, EvalChoices, Evaluation, Result
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
"""Tokens up to which a map can be read."""
LATE = 2
"""Layers before which attention is still local, so that means are taken from here on."""
READ_AT_ONCE = 4096
"""Tokens of the texts that the model reads in one batch."""


class Sinks(Evaluation):
    """How much attention rests on the first tokens?"""

    name = "sinks"
    title = "Attention sinks"

    class Choices(EvalChoices):
        """How much attention rests on the first tokens, by layer and head (StreamingLLM, figure
        2)."""

        lengths: tuple[Count, ...] = Field(default=(16, 256), min_length=1)
        """Tokens of the texts."""
        texts: int = Field(default=256, ge=1)
        """Texts of the shortest length; longer ones are fewer, so that all lengths have the same
        number of tokens."""
        first_tokens: int = Field(default=4, ge=1)
        """Number of first tokens whose share of attention is measured."""
        map_layers: tuple[int, ...] = (0, 1, 2, -1)
        """Layers whose attention is drawn, at the shortest length."""

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
            raise ValueError(f"sinks.map_layers {wrong}: the model has layers 0 to {layers - 1}")
        shortest = min(choices.lengths)
        if choices.map_layers and shortest > MAPPED:
            raise ValueError(
                f"sinks.map_layers at {shortest} tokens: maps are drawn up to {MAPPED}; set map_layers=[], or "
                f"add a shorter length"
            )
        cells = []
        for length in choices.lengths:
            texts = pieces(choices, self.documents, length)
            if not texts:
                raise ValueError(f"sinks.lengths {length}: no held-out document has so many tokens")
            if length <= choices.first_tokens:
                raise ValueError(f"sinks.lengths {length} is not above first_tokens {choices.first_tokens}")
            self.check_reach(length)
            cells.append({"length": length, "texts": len(texts)})
        return cells

    def measure(self, cell: Cell) -> Result:
        """Return {"first": [L, H, N], "softmax": [L, H], "heads": by epsilon [L, N],
        "softmax_heads": by epsilon [L], "values" and "residual": [L, 2], first token and others,
        "maps": layer -> [T, T], at the shortest length only}.
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
        """Return rows of kind `layer` (means over heads), `head` (length, layer, head) and `map`
        (layer, query, key)."""
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
                if length == max(choices.lengths):  # of a short text even an even head gives the first token much
                    layers[-1] |= head_columns(result, layer)
            late_LHN = first_LHN[LATE:] if len(first_LHN) > LATE else first_LHN
            summary[f"first_token_mass_{length}"] = float(late_LHN[..., 0].mean())
            if length == max(choices.lengths):
                summary |= head_shares(result)
            for layer, map_TT in result["maps"].items():
                maps += map_rows(length, int(layer), map_TT)
        return EvalScores(
            eval=cls.name,
            protocol=f"means over texts and the queries of their second half; the summary is that from layer {LATE} on",
            recipe=choices.model_dump(mode="json"),
            rows=layers + heads + maps,
            summary=summary,
            note="A sink says where attention that is not needed goes, not that the first tokens matter.",
        )

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return the mass on the first token and its norms by layer, all models together; then by
        head, and maps, of each model."""
        figures = [_layers_figure(length, models, style) for length in _lengths(models)]
        figures += _norm_figures(models, style)
        for name, scores in models.items():
            figures.append(_heads_figure(name, scores))
            for layer in scores.distinct("layer", kind="map"):
                figures.append(_map_figure(name, layer, scores.rows_with(kind="map", layer=layer)))
        return figures


def pieces(choices: Sinks.Choices, documents: list[Document], length: int) -> list[np.ndarray]:
    """Return texts of `length` tokens, taken from all documents in turn, as many as `texts` allows
    at this length."""
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
    """Return a row for each head of a layer: the mass on each first token, and on the sink in the
    softmax."""
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
    """Return the norms of the first token's value and residual stream in a layer, and the means of
    all others."""
    row: Row = {}
    for name in ("values", "residual"):
        row[f"{name}_first"], row[f"{name}_others"] = result[name][layer]
    return row


def head_columns(result: Result, layer: int) -> Row:
    """Return the shares of a layer's heads that rest on the first token, and on the sink in the
    softmax."""
    row: Row = {}
    for epsilon, heads_LN in result["heads"].items():
        row[f"heads_{epsilon}"] = heads_LN[layer][0]
        row[f"softmax_heads_{epsilon}"] = result["softmax_heads"][epsilon][layer]
    return row


def head_shares(result: Result) -> dict[str, float]:
    """Return Sink^eps_k over all layers: `sink_0.3_1` for token 1, the first; `sink_0.3_softmax`
    for the sink logit."""
    shares = {}
    for epsilon, heads_LN in result["heads"].items():
        for n, share in enumerate(np.mean(heads_LN, axis=0), start=1):
            shares[f"sink_{epsilon}_{n}"] = float(share)
        if any(result["softmax_heads"][epsilon]):
            shares[f"sink_{epsilon}_softmax"] = float(np.mean(result["softmax_heads"][epsilon]))
    return shares


def map_rows(length: int, layer: int, map_TT: list[list[float]]) -> list[Row]:
    """Return a row for each (query, key) that a causal layer sees."""
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
    """Draw the mass on the first token by layer, a curve for each model."""
    from longreach.evaluation.figures import lines

    curves = {}
    even = 0.0
    for name, scores in models.items():
        rows = scores.rows_with(kind="layer", length=length)
        if rows:
            curves[name] = [(row["layer"], row["first_token"]) for row in rows]
            even = rows[0]["uniform"]
    title = f"Attention on the first token, texts of {length:,} tokens"
    caption = f"Even attention would give the first token {even:.3f}; a layer far above that uses it as a sink."
    return lines(f"sinks-{length}.png", title, caption, ("layer", "share of attention"), curves, style)


def _norm_figures(models: dict[str, EvalScores], style: Style) -> list[Figure]:
    """Draw the first token's norms over all others' by layer, a curve for each model, at its
    greatest length."""
    from longreach.evaluation.figures import lines

    figures = []
    told = {
        "values": "Below 1: attention on the first token brings less than on others, as on a sink.",
        "residual": "Far above 1: massive activations, which go with a sink.",
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
            title = f"Norm of the first token's {norm}, over that of other tokens"
            figures.append(lines(f"sinks-{norm}.png", title, caption, ("layer", "ratio"), curves, style, log=True))
    return figures


def _heads_figure(name: str, scores: EvalScores) -> Figure:
    """Draw the mass on the first token by layer and head, at the shortest length."""
    from longreach.evaluation.figures import grid

    shortest = min(scores.distinct("length", kind="head"))
    heads: dict[str, list[tuple[float, str]]] = {}
    for row in scores.rows_with(kind="head", length=shortest):
        mass = row["first_token"]
        heads.setdefault(f"head {row['head']}", []).append((mass, f"{mass:.2f}"))
    return grid(
        f"sinks-{name}.png",
        f"Attention on the first token by head: {name}",
        f"Texts of {shortest:,} tokens. Dark: the head rests on the first token.",
        ("layer", "share of attention"),
        list(map(str, scores.distinct("layer", kind="head", length=shortest))),
        heads,
        1.0,
    )


def _map_figure(name: str, layer: int, rows: list[Row]) -> Figure:
    """Draw what each query of a layer sees, the mean over heads and texts."""
    from longreach.evaluation.figures import grid

    tokens = rows[0]["length"]
    masses = {(row["query"], row["key"]): row["mass"] for row in rows}
    queries = {}
    for query in range(tokens):
        queries[str(query)] = [(masses.get((query, key), math.nan), "") for key in range(tokens)]
    return grid(
        f"sinks-{name}-layer-{layer}.png",
        f"Attention of layer {layer}: {name}",
        "A dark column is a token on which all later ones rest: a sink.",
        ("key", "share of attention"),
        list(map(str, range(tokens))),
        queries,
        1.0,
        "query",
    )
