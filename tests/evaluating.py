"""An evaluation run in this process, from its checks to its scores."""

from longreach.evaluation.cells import measured


def evaluate(kind, model, tokenizer, texts=(), /, **choices):
    """The scores of an evaluation's class with these choices on held-out texts."""
    evaluation = kind(model, tokenizer, kind.Choices(**choices), texts)
    cells = evaluation.cells()
    results = []
    for number, result in measured(evaluation, dict(enumerate(cells))):
        results.append((cells[number], result))
    return kind.scores(evaluation.choices, results)
