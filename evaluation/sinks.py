"""Where attention rests: the mass on first tokens, by layer and head (StreamingLLM, arXiv:2309.17453, figure 2).

Texts are pieces of held-out documents, each read from its own first token on (BOS or a sink token, if the model has
one). Mass is averaged over texts and the queries of their second half; a head that spread its attention evenly would
put 1 / (t + 1) on each token at position t, which `uniform` says.

    longreach evaluate MODEL --eval sinks --set lengths=[16,256]
"""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longreach.attention.sink_mass import attention_mass
from longreach.evaluation.documents import Document, first_token_id, with_first
from longreach.evaluation.figures import curves, heatmap
from longreach.evaluation.likelihood import check_attention
from longreach.evaluation.recipe import SinksRecipe
from longreach.evaluation.scores import EvalScores

MAPPED = 64
"""Tokens up to which a map can be read."""
LATE = 2
"""Layers before which attention is still local, so that means are taken from here on."""


def cells(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, recipe: SinksRecipe, documents: list[Document]
) -> list[dict[str, Any]]:
    """A length each. ValueError where the documents are too short, or a layer is not there."""
    check_attention(model)
    layers = model.config.num_hidden_layers
    if wrong := [n for n in recipe.map_layers if not -layers <= n < layers]:
        raise ValueError(f"sinks.map_layers {wrong}: the model has layers 0 to {layers - 1}")
    if recipe.map_layers and min(recipe.lengths) > MAPPED:
        raise ValueError(
            f"sinks.map_layers at {min(recipe.lengths)} tokens: maps are drawn up to {MAPPED}; set map_layers=[], or "
            f"add a shorter length"
        )
    for length in recipe.lengths:
        if not (found := pieces(recipe, documents, length)):
            raise ValueError(f"sinks.lengths {length}: no held-out document has so many tokens")
        if length <= recipe.first_tokens:
            raise ValueError(f"sinks.lengths {length} is not above first_tokens {recipe.first_tokens}")
    return [
        {"length": length, "texts": len(found)}
        for length in recipe.lengths
        if (found := pieces(recipe, documents, length))
    ]


def pieces(recipe: SinksRecipe, documents: list[Document], length: int) -> list[np.ndarray]:
    """At most so many texts of so many tokens, taken from all documents in turn."""
    wanted = max(1, recipe.texts * min(recipe.lengths) // length)
    cut = [[d.ids_T[n : n + length] for n in range(0, len(d.ids_T) - length + 1, length)] for d in documents]
    return [one[n] for n in range(max(map(len, cut), default=0)) for one in cut if n < len(one)][:wanted]


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: SinksRecipe,
    documents: list[Document],
    cell: dict[str, Any],
) -> dict[str, Any]:
    """{"first": [layers, heads, first_tokens], "softmax": [layers, heads], "maps": layer -> [T, T] (if shortest)}."""
    first, texts = first_token_id(tokenizer), pieces(recipe, documents, cell["length"])
    ids_BT = torch.from_numpy(np.stack([with_first(ids_T, first)[: cell["length"]] for ids_T in texts])).to(
        model.device
    )
    layers = model.config.num_hidden_layers
    drawn = sorted({n % layers for n in recipe.map_layers}) if cell["length"] == min(recipe.lengths) else []
    parts = ids_BT.split(max(1, 4096 // cell["length"]))
    masses = [attention_mass(model, part, first_tokens=recipe.first_tokens, map_layers=drawn) for part in parts]
    weight = [len(part) / len(ids_BT) for part in parts]
    return {
        "first": sum(m.first_LHN * w for m, w in zip(masses, weight, strict=True)).tolist(),  # type: ignore[union-attr]
        "softmax": sum(m.softmax_LH * w for m, w in zip(masses, weight, strict=True)).tolist(),  # type: ignore[union-attr]
        "maps": {
            str(n): sum(m.maps[n] * w for m, w in zip(masses, weight, strict=True)).tolist()  # type: ignore[union-attr]
            for n in drawn
        },
    }


def collect(recipe: SinksRecipe, results: list[tuple[dict[str, Any], dict[str, Any]]]) -> EvalScores:
    """Rows of kind `head` (length, layer, head), `layer` (means over heads) and `map` (layer, query, key)."""
    heads: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    maps: list[dict[str, Any]] = []
    summary: dict[str, float] = {}
    for cell, result in results:
        length, first_LHN = cell["length"], np.array(result["first"])
        at = np.arange(length // 2, length)
        uniform = float((1 / (at + 1)).mean())
        for layer, (first_HN, softmax_H) in enumerate(zip(first_LHN, result["softmax"], strict=True)):
            about = {"length": length, "texts": cell["texts"], "layer": layer}
            rows = [
                {"kind": "head", **about, "head": head, "first_token": float(first_N[0]), "uniform": uniform}
                | {f"token_{n}": float(mass) for n, mass in enumerate(first_N)}
                | {"softmax_sink": float(softmax)}
                for head, (first_N, softmax) in enumerate(zip(first_HN, softmax_H, strict=True))
            ]
            heads += rows
            means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key not in ("kind", "head")}
            layers.append(means | {"kind": "layer", **about})
        late = first_LHN[LATE:] if len(first_LHN) > LATE else first_LHN
        summary |= {f"first_token_mass_{length}": float(late[..., 0].mean())}
        for layer, map_TT in result["maps"].items():
            place = {"kind": "map", "length": length, "layer": int(layer)}
            maps += [
                place | {"query": q, "key": k, "mass": mass}
                for q, line in enumerate(map_TT)
                for k, mass in enumerate(line[: q + 1])
            ]
    return EvalScores(
        eval="sinks",
        protocol=f"means over texts and the queries of their second half; the summary is that from layer {LATE} on",
        recipe=recipe.model_dump(mode="json"),
        rows=layers + heads + maps,
        summary=summary,
        note="A sink says where attention that is not needed goes, not that the first tokens matter.",
    )


def figure(scores: EvalScores) -> Any:
    """The mass on the first token by layer; below, by layer and head, and the maps of some layers."""
    rows = [row | {"texts of": f"{row['length']} tokens"} for row in scores.rows if row["kind"] == "layer"]
    question = [
        f"{scores.model}: how much attention rests on the first token?",
        f"even attention would give it {min(rows, key=lambda r: r['length'])['uniform']:.2f} in the shortest texts; "
        "far above that, it is a sink",
    ]
    titles = (question, "layer", "mean share of attention")
    parts: list[Any] = [curves(rows, x="layer", y="first_token", by="texts of", titles=titles)]
    shortest = min(scores.recipe["lengths"])
    heads = [
        row | {"text": f"{row['first_token']:.2f}"}
        for row in scores.rows
        if row["kind"] == "head" and row["length"] == shortest
    ]
    parts.append(
        heatmap(
            heads,
            x="layer",
            y="head",
            value="first_token",
            text="text",
            titles=(f"By head, texts of {shortest} tokens", "layer", "head"),
            value_title="share on the first token",
            top=1.0,
            bright_low=False,
        )
    )
    maps = [row for row in scores.rows if row["kind"] == "map"]
    drawn = [
        alt.Chart(alt.Data(values=[row for row in maps if row["layer"] == layer]), title=f"layer {layer}")
        .mark_rect()
        .encode(
            x=alt.X("key", type="ordinal", title="key"),
            y=alt.Y("query", type="ordinal", title="query"),
            color=alt.Color("mass", type="quantitative", title="attention", scale=alt.Scale(scheme="cividis")),
            tooltip=[alt.Tooltip(key, type="quantitative") for key in ("query", "key", "mass")],
        )
        .properties(width=180, height=180)
        for layer in dict.fromkeys(row["layer"] for row in maps)
    ]
    if drawn:
        parts.append(alt.hconcat(*drawn))
    return alt.vconcat(*parts).resolve_scale(color="independent", strokeDash="independent")
