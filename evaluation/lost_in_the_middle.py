"""Lost in the middle (Liu et al., arXiv:2307.03172): does it matter where in a long prompt the answer stands?

  kv    a JSON object of random UUIDs, one of whose values is asked for: pure retrieval
  qa    documents of which one holds the answer; before it, two baselines: closed book (no document) and oracle (only
        the right one)

Prompts are the paper's. Without its data files (kv_data, qa_data), pairs are drawn, and documents tell of invented
people and places: nobody can know the answers by heart, and closed book shows it. Each question is asked with the
answer at every place; the U-shaped curve of many models is the figure. Scored teacher-forced (evaluation/reader.py),
and with `new_tokens` by whether the generated text's first line holds an answer (the paper's `best_subspan_em`).

    longreach evaluate MODEL --eval lost_in_the_middle --set pairs=[20] --set documents=[10]
"""

from __future__ import annotations

import gzip
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longreach.evaluation.documents import Document
from longreach.evaluation.figures import curves
from longreach.evaluation.reader import Reader, spelled
from longreach.evaluation.recipe import LostInTheMiddleRecipe
from longreach.evaluation.scores import EvalScores, retrieval_row, wilson

KV = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
QA = (
    "Write a high-quality answer for the given question using only the provided search results (some of which might be "
    "irrelevant).\n\n"
)
GIVEN = ("Ada", "Bruno", "Clara", "Dario", "Edda", "Felix", "Greta", "Hugo", "Ines", "Jonas", "Karla", "Levin")
FAMILY = ("Arven", "Belmor", "Castrin", "Dovrel", "Ermont", "Falkes", "Gorlan", "Hestra", "Ivarne", "Jutland", "Korvin")
PLACES = ("Alderby", "Brimfell", "Corvale", "Dunmorra", "Eskworth", "Farrowick", "Glenhar", "Hollowmere", "Ironby",
          "Jarrowden", "Kestrel Bay", "Lindemoor", "Marlstone", "Nethercombe", "Oxmarsh", "Pinehaven")  # fmt: skip
WORKS = ("bridge", "lighthouse", "library", "theatre", "clock tower", "railway station", "harbour", "observatory")


def cells(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, recipe: LostInTheMiddleRecipe,
    documents: list[Document],
) -> list[dict[str, Any]]:  # fmt: skip
    """One for each size and question, with all places, as their prompts begin alike. `documents` are not read.

    Raises ValueError for a data file that is missing or of another form, or that holds fewer questions than `trials`.
    """
    for path, keys in (
        (recipe.kv_data, {"ordered_kv_records", "key", "value"}),
        (recipe.qa_data, {"question", "ctxs", "answers"}),
    ):
        if path is None:
            continue
        lines = list(zip(range(recipe.trials), _lines(path), strict=False))
        if len(lines) < recipe.trials or (missing := keys - lines[0][1].keys()):
            found = f"{len(lines)} questions" if len(lines) < recipe.trials else f"no {', '.join(sorted(missing))}"
            raise ValueError(f"{path} has {found}, {recipe.trials} questions with {', '.join(sorted(keys))} are needed")
    most = min(len(PLACES) * len(WORKS), len(GIVEN) * len(FAMILY))
    if recipe.qa_data is None and max(recipe.documents, default=0) > most:
        raise ValueError(
            f"documents {max(recipe.documents)}: at most {most} can be made up; give qa_data, or ask for fewer"
        )
    sizes = [("kv", n) for n in recipe.pairs] + [("qa", n) for n in recipe.documents]
    wanted = [{"task": task, "size": n, "trial": trial} for task, n in sizes for trial in range(recipe.trials)]
    for cell in wanted:
        try:
            next(_prompts(recipe, cell))
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(f"{recipe.kv_data or recipe.qa_data}, question {cell['trial']}: {error!r}") from error
    return wanted


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: LostInTheMiddleRecipe,
    documents: list[Document],
    cell: dict[str, Any],
) -> dict[str, Any]:
    """{"cases": one for each place, and for qa the two baselines}. FloatingPointError: logits that are not finite."""
    reader, cases = Reader(model, tokenizer), []
    for place, prompt, answers in _prompts(recipe, cell):
        where = f"lost_in_the_middle {cell | {'place': place}}"
        ids, expected = spelled(tokenizer, prompt, f" {answers[0]}", where)
        room = max(recipe.new_tokens, len(expected)) if recipe.new_tokens else 0  # a UUID has about 30 tokens
        found = reader.answer(ids, expected, where, new_tokens=room)
        said = {"subspan": best_subspan_em(found.got.split("\n")[0], answers)} if recipe.new_tokens else {}
        about = {"place": place, "prompt_tokens": len(ids), "prompt": prompt, "expected": answers[0]}
        cases.append(cell | about | found.as_row() | said)
    return {"cases": cases}


def collect(recipe: LostInTheMiddleRecipe, results: list[tuple[dict[str, Any], dict[str, Any]]]) -> EvalScores:
    """Rows of kind `cell` (task, size and place; `depth` is the place as a share), `baseline` and `size`."""
    cases = [case for _, result in results for case in result["cases"]]
    rows: list[dict[str, Any]] = []
    summary: dict[str, float] = {}
    for task, size in dict.fromkeys((case["task"], case["size"]) for case in cases):
        here = [case for case in cases if (case["task"], case["size"]) == (task, size)]
        for place in dict.fromkeys(case["place"] for case in here):
            kind = "baseline" if isinstance(place, str) else "cell"
            depth = place / (size - 1) if kind == "cell" else None
            rows.append(
                {"task": task, "place": str(place)} | _row(kind, [c for c in here if c["place"] == place], size, depth)
            )
        placed = [case for case in here if not isinstance(case["place"], str)]
        rows.append({"task": task, "place": "all"} | _row("size", placed, size, None))
        summary |= {f"{task}_{size}": rows[-1]["accuracy"], f"{task}_nll_{size}": rows[-1]["nll"]}
    return EvalScores(
        eval="lost_in_the_middle",
        protocol="`correct`: teacher-forced, every token of the answer is the argmax; `subspan`: an answer is in the "
        "greedy text (best_subspan_em)",
        recipe=recipe.model_dump(mode="json"),
        rows=rows,
        summary=summary,
        note="UUIDs can only be copied; answers about invented people cannot be known by heart.",
        cases=cases,
    )


def _row(kind: str, cases: list[dict[str, Any]], size: int, depth: float | None) -> dict[str, Any]:
    row = retrieval_row(kind, cases, size, depth)
    row["size"] = row.pop("length")
    if "subspan" in cases[0]:
        said = int(sum(case["subspan"] for case in cases))
        low, high = wilson(said, len(cases))
        row |= {"subspan": said / len(cases), "subspan_low": low, "subspan_high": high}
    return row | {"prompt_tokens": float(np.mean([case["prompt_tokens"] for case in cases]))}


def best_subspan_em(prediction: str, answers: list[str]) -> float:
    """1.0 if one of the answers is in the prediction, both without case, punctuation, articles and spare spaces."""
    said = _normal(prediction)
    return float(any(_normal(answer) in said for answer in answers))


def _normal(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def places(size: int, count: int) -> list[int]:
    """Evenly spread from 0 to size - 1."""
    return sorted({round(n * (size - 1) / (count - 1)) for n in range(count)})


def _prompts(recipe: LostInTheMiddleRecipe, cell: dict[str, Any]) -> Iterator[tuple[int | str, str, list[str]]]:
    """(place, prompt, answers) of one question: at every place, and the baselines."""
    size = cell["size"]
    if cell["task"] == "kv":
        records, wanted = _pairs(recipe, cell)
        for place in places(size, recipe.positions):
            others = [pair for pair in records if pair != wanted][: size - 1]
            shown = [*others[:place], wanted, *others[place:]]
            lines = ",\n ".join(f'"{key}": "{value}"' for key, value in shown)
            yield place, f'{KV}{{{lines}}}\n\nKey: "{wanted[0]}"\nCorresponding value:', [wanted[1]]
        return
    question, answers, gold, others = _question(recipe, cell)
    end = f"Question: {question}\nAnswer:"
    for place in places(size, recipe.positions):
        yield place, QA + _results([*others[:place], gold, *others[place : size - 1]]) + end, answers
    yield "closed book", end, answers
    yield "oracle", QA + _results([gold]) + end, answers


def _results(documents: list[tuple[str, str]]) -> str:
    return "".join(f"Document [{n}](Title: {title}) {text}\n" for n, (title, text) in enumerate(documents, 1)) + "\n"


def _lines(path: str) -> Iterator[dict[str, Any]]:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; leave it out for questions that are made up")
    with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _nth(path: str, n: int) -> dict[str, Any]:
    return next(line for i, line in enumerate(_lines(path)) if i == n)


def _pairs(recipe: LostInTheMiddleRecipe, cell: dict[str, Any]) -> tuple[list[tuple[str, str]], tuple[str, str]]:
    """(pairs, the one that is asked for)."""
    if recipe.kv_data:
        line = _nth(recipe.kv_data, cell["trial"])
        records = [(key, value) for key, value in line["ordered_kv_records"]]
        if len(records) < cell["size"]:
            raise ValueError(f"{recipe.kv_data} has {len(records)} pairs a question, pairs asks for {cell['size']}")
        return records, (line["key"], line["value"])
    chance = np.random.default_rng([recipe.seed, cell["size"], cell["trial"]])
    drawn = [str(UUID(bytes=chance.bytes(16), version=4)) for _ in range(2 * cell["size"])]
    records = list(zip(drawn[::2], drawn[1::2], strict=True))
    return records, records[int(chance.integers(cell["size"]))]


def _question(
    recipe: LostInTheMiddleRecipe, cell: dict[str, Any]
) -> tuple[str, list[str], tuple[str, str], list[tuple[str, str]]]:
    """(question, answers, the document that holds them, others); a document is a title and a text."""
    size = cell["size"]
    if recipe.qa_data:
        line = _nth(recipe.qa_data, cell["trial"])
        gold = [(c["title"], c["text"]) for c in line["ctxs"] if c.get("isgold")]
        others = [(c["title"], c["text"]) for c in line["ctxs"] if not c.get("isgold") and not c.get("hasanswer")]
        if not gold or len(others) < size - 1:
            raise ValueError(
                f"{recipe.qa_data}, question {cell['trial']}: {len(gold)} gold and {len(others)} other documents, "
                f"documents asks for {size}"
            )
        return line["question"], list(line["answers"]), gold[0], others
    chance = np.random.default_rng([recipe.seed, size, cell["trial"], 1])
    things = chance.choice(len(PLACES) * len(WORKS), size, replace=False)
    people = chance.choice(len(GIVEN) * len(FAMILY), size, replace=False)
    years = chance.integers(1790, 1960, (size, 2))
    told: list[tuple[str, str, str, tuple[str, str]]] = []
    for thing, person, (begun, opened) in zip(things.tolist(), people.tolist(), np.sort(years).tolist(), strict=True):
        place, work = PLACES[thing % len(PLACES)], WORKS[thing // len(PLACES)]
        name = f"{GIVEN[person % len(GIVEN)]} {FAMILY[person // len(GIVEN)]}"
        text = (
            f"The {work} of {place} was begun in {begun} and opened in {opened}. It was designed by {name}, who had "
            f"drawn the plans in a single winter. Visitors remember it for its stone and for the view from its roof."
        )
        told.append((place, work, name, (f"{place} {work}", text)))
    place, work, name, answer = told[0]
    return f"who designed the {work} of {place}", [name], answer, [document for *_, document in told[1:]]


def figure(scores: EvalScores) -> Any:
    """NLL by place, a line a task and size: a U upside down is a model that is lost in the middle."""
    question = [
        f"{scores.model}: does it matter where the answer stands?",
        "NLL of the answer: a hump in the middle means that answers at both ends are found more easily",
    ]
    words = {"kv": "JSON pairs", "qa": "documents"}
    rows = [row | {"line": f"{row['size']} {words[row['task']]}"} for row in scores.rows if row["kind"] == "cell"]
    titles = (question, "place of the answer (0 first, 1 last)", "NLL of the answer (nats per token)")
    return curves(rows, x="depth", y="nll", by="line", titles=titles)
