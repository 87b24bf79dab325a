"""Run an evaluation in this process, from its checks to its scores."""

from longreach.evaluation import EVALS
from longreach.evaluation.base import Background
from longreach.evaluation.cells import measured
from longreach.evaluation.figures import Style


def evaluate(kind, model, tokenizer, texts=(), /, **choices):
    """Return the scores of an evaluation class with these choices on held-out texts."""
    evaluation = kind(model, tokenizer, kind.Choices(**choices), texts)
    cells = evaluation.cells()
    results = []
    for number, result in measured(evaluation, dict(enumerate(cells))):
        results.append((cells[number], result))
    return kind.scores(evaluation.choices, results)


def drawn(scores):
    """Return the figures of one model's scores as file -> Vega-Lite."""
    figures = EVALS[scores.eval].figures({scores.model: scores}, Style.of([scores.model]), Background())
    return {figure.file: figure.vega_lite for figure in figures}


def names_of(chart):
    """Return the names of a figure's curves, in the order of the legend."""
    rows = [row for values in chart["datasets"].values() for row in values] if "datasets" in chart else []
    rows += [row for part in [chart, *chart.get("layer", [])] for row in part.get("data", {}).get("values", [])]
    return list(dict.fromkeys(row["name"] for row in rows if "name" in row))
