"""Lost in the middle (Liu et al., arXiv:2307.03172): whether the position of the answer in a long
prompt matters.

  kv    retrieval: the value of a key in a JSON object of random UUIDs
  qa    question answering over documents, one of which has the answer, with two baselines: closed book (no document)
        and oracle (only the right document)

The prompts are the paper's. Without its data files (kv_data, qa_data), pairs are drawn at random,
and documents are about invented people and places. So no model can have memorised the answers, as
the closed-book baseline shows. Each question is asked with the answer at every place. The figure
shows the U-shaped curve that many models have. Answers are scored teacher-forced
(evaluation/reader.py) and, with `new_tokens`, by whether the first line of the generated text
contains an answer (the paper's `best_subspan_em`).

    longreach evaluate MODEL --eval lost_in_the_middle --set pairs=[20] --set documents=[10]
"""

from __future__ import annotations

import gzip
import itertools
import re
import string
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar
from uuid import UUID

from pydantic import BaseModel, Field, ValidationError, model_validator

from longreach.evaluation.base import Background, Cell, DataFile, EvalChoices, Evaluation, Result
from longreach.evaluation.scores import EvalScores, Row, gathered, mean_of, retrieval_row, wilson_over_texts
from longreach.infra.choices import New, dotted
from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np

    from longreach.evaluation.blocks import Figure
    from longreach.evaluation.figures import Style
else:
    np = lazy_module("numpy")

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
MOST_INVENTED = {
    "mixed": min(len(PLACES) * len(WORKS), len(GIVEN) * len(FAMILY)),
    "hard": len(PLACES) + len(WORKS) - 1,
    "random": (len(PLACES) - 1) * (len(WORKS) - 1) + 1,
}
"""Maximum number of distinct documents about invented people, by kind of distractors."""
THINGS = {"kv": "JSON pairs", "qa": "documents"}
"""Unit of the size of each task."""

Pair = tuple[str, str]
Distractors = Literal["mixed", "hard", "random"]


class LostInTheMiddle(Evaluation):
    """Does it matter where in a long prompt the answer is?"""

    name = "lost_in_the_middle"
    title = "Lost in the middle"
    revision = 1

    class Choices(EvalChoices):
        """Finding a pair or document among many of its kind, by its place (Lost in the Middle,
        2307.03172)."""

        pairs: tuple[int, ...] = ()
        """Numbers of JSON pairs for key-value retrieval (the paper: 75, 140, 300); empty: not
        measured."""
        documents: tuple[int, ...] = ()
        """Numbers of documents for question answering (the paper: 10, 20, 30); empty: not measured."""
        positions: int = Field(default=5, ge=2)
        """Number of places at which the answer is put, evenly spread from the first to the last."""
        trials: int = Field(default=4, ge=1)
        """Number of questions for each size; each is asked at every place."""
        new_tokens: int = Field(default=0, ge=0)
        """Number of tokens to generate as well, to look for the answer in them (at least the length
        of the answer plus 4); 0: score teacher-forced only."""
        kv_data: DataFile = None
        """The paper's file kv-retrieval-N_keys.jsonl.gz (one size). Default: random pairs."""
        qa_data: DataFile = None
        """The paper's nq-open file (gzipped JSON lines). Default: documents about invented people."""
        distractors: New[Distractors | tuple[Distractors, ...]] = "mixed"
        """Kind of invented documents without the answer. `hard`: they share the place or the kind of
        building with the question, like results of a search engine. `random`: they share neither.
        `mixed`: as drawn. A list measures each kind."""

        @model_validator(mode="after")
        def _asks_something(self) -> LostInTheMiddle.Choices:
            sizes = [*self.pairs, *self.documents]
            if not sizes:
                raise ValueError("pairs and documents are both empty: set the number of one of them, e.g. pairs: [75]")
            if min(sizes) < 2:
                raise ValueError(f"pairs and documents have a size of {min(sizes)}, but must be at least 2")
            kinds = self.kinds()
            if not kinds:
                raise ValueError("distractors is empty: list at least one kind")
            largest, kind = max(self.documents, default=0), min(kinds, key=lambda kind: MOST_INVENTED[kind])
            if self.qa_data is None and largest > MOST_INVENTED[kind]:
                raise ValueError(
                    f"documents is {largest}, but at most {MOST_INVENTED[kind]} can be invented with {kind} "
                    f"distractors: lower it or set qa_data"
                )
            if self.qa_data and kinds != ("mixed",):
                raise ValueError(
                    f"distractors {self.distractors!r} are for invented documents, but qa_data {self.qa_data} has its "
                    f"own documents: leave one of the two out"
                )
            return self

        def kinds(self) -> tuple[Distractors, ...]:
            """Return the kinds of distractors; usually there is only one."""
            return (self.distractors,) if isinstance(self.distractors, str) else self.distractors

    choices: Choices

    def cells(self) -> list[Cell]:
        """Return a cell for each size and question. A cell has all places, because their prompts
        share a prefix.

        Raises:
            ValueError: a data file is missing, has another format or fewer questions than `trials`;
                or a prompt is too long for the model.
        """
        choices = self.choices
        if choices.kv_data:
            _check_data(choices.kv_data, KvLine, choices.trials)
        if choices.qa_data:
            _check_data(choices.qa_data, QaLine, choices.trials)
        cells: list[Cell] = []
        for group in _groups(choices):
            for trial in range(choices.trials):
                cell = group | {"trial": trial}
                question = next(questions(choices, cell))
                self.check_reach(question.prompt + question.written, -1)
                self.check_reach(question.prompt, choices.new_tokens - 1)
                cells.append(cell)
        return cells

    def measure(self, cell: Cell) -> Result:
        """Return {"cases": one for each place, and for qa the two baselines}."""
        from longreach.evaluation.reader import Reader, spelled

        reader = Reader(self.model, self.tokenizer)
        cases = []
        for question in questions(self.choices, cell):
            where = f"lost_in_the_middle {cell | {'place': question.place}}"
            answers = question.answers
            prompt_ids, answer_ids = spelled(self.tokenizer, question.prompt, question.written, where)
            new_tokens = self.choices.new_tokens
            if new_tokens:
                new_tokens = max(new_tokens, len(answer_ids) + 4)  # a UUID has about 30 tokens
            answered = reader.answer(prompt_ids, answer_ids, where, new_tokens=new_tokens)
            case = cell | {
                "place": question.place,
                "prompt_tokens": len(prompt_ids),
                "prompt": question.prompt,
                "expected": answers[0],
            }
            case |= answered.as_row()
            if new_tokens:
                case["subspan"] = best_subspan_em(answered.got.split("\n")[0], answers)
            cases.append(case)
        return {"cases": cases}

    @classmethod
    def scores(cls, choices: Choices, results: list[tuple[Cell, Result]]) -> EvalScores:
        """Return rows of kind `cell` (task, size and place; `depth` is the place as a share),
        `baseline` and `size`."""
        cases = gathered(results, "cases")
        rows: list[Row] = []
        summary: dict[str, float] = {}
        for group in _groups(choices):
            by_place: dict[int | str, list[Row]] = {}
            placed = []  # all but the baselines, whose place is a name
            for case in cases:
                if group.items() <= case.items():
                    by_place.setdefault(case["place"], []).append(case)
                    if not isinstance(case["place"], str):
                        placed.append(case)
            size, asked = group["size"], _asked(group)
            for place, of_place in by_place.items():
                if isinstance(place, str):
                    row = _row("baseline", of_place, size, None)
                else:
                    row = _row("cell", of_place, size, place / (size - 1))
                rows.append(group | {"place": str(place)} | row)
            total = _row("size", placed, size, None)
            rows.append(group | {"place": "all"} | total)
            summary |= {f"{asked}_{size}": total["accuracy"], f"{asked}_nll_{size}": total["nll"]}
            if "subspan" in total:
                summary[f"{asked}_subspan_{size}"] = total["subspan"]
        return EvalScores(
            eval=cls.name,
            protocol="`correct`: teacher-forced, every token of the answer is the argmax; `subspan`: an answer is in "
            "the greedy text (best_subspan_em)",
            recipe=choices.model_dump(mode="json"),
            rows=rows,
            summary=summary,
            note="UUIDs can only be copied; answers about invented people cannot be known by heart.",
            cases=cases,
        )

    @classmethod
    def figures(cls, models: dict[str, EvalScores], style: Style, background: Background) -> list[Figure]:
        """Return a figure for each task and size: the answer's NLL by its place, with a curve for
        each model and kind of distractors."""
        from longreach.evaluation.figures import Style, lines

        curves: dict[tuple[str, int], dict[str, list[tuple[float, float]]]] = {}
        for name, scores in models.items():
            for row in scores.rows_with(kind="cell"):
                curve = name
                if "distractors" in row:
                    curve += f", {row['distractors']} distractors"
                places = curves.setdefault((row["task"], row["size"]), {}).setdefault(curve, [])
                places.append((100 * row["depth"], row["nll"]))
        caption = "A hump in the middle means that answers at both ends are found more easily. Lower is better."
        axes = ("place of the answer (%, 0: first)", "answer (nats per token)")
        figures = []
        for (task, size), of_size in curves.items():
            title = f"By place of the answer: {size} {THINGS[task]}"
            looks = style if of_size.keys() <= models.keys() else Style.of(of_size)
            figures.append(lines(f"lost-in-the-middle-{task}-{size}.png", title, caption, axes, of_size, looks))
        return figures


def _groups(choices: LostInTheMiddle.Choices) -> list[Cell]:
    """Return the groups of cells: task and size and, for documents with several kinds of
    distractors, the kind."""
    groups: list[Cell] = [{"task": "kv", "size": size} for size in choices.pairs]
    kinds = choices.kinds()
    for size in choices.documents:
        group: Cell = {"task": "qa", "size": size}
        if len(kinds) == 1:
            groups.append(group)
            continue
        groups += [group | {"distractors": kind} for kind in kinds]
    return groups


def _asked(group: Cell) -> str:
    """Return the name of a group in the summary: `kv`, `qa`, or for example `qa_hard` if there are
    several kinds of distractors."""
    if "distractors" in group:
        return f"{group['task']}_{group['distractors']}"
    return str(group["task"])


def _row(kind: str, cases: list[Row], size: int, depth: float | None) -> Row:
    """Return the mean of cases with intervals over questions, because each is asked at every place.
    If text was generated, include the share of texts that contain an answer."""
    row = retrieval_row(kind, cases, size, depth, over_texts=True)
    row["size"] = row.pop("length")
    if "subspan" in cases[0]:
        low, high = wilson_over_texts(cases, [case["subspan"] for case in cases])
        row |= {"subspan": mean_of(cases, "subspan"), "subspan_low": low, "subspan_high": high}
    row["prompt_tokens"] = mean_of(cases, "prompt_tokens")
    return row


def best_subspan_em(prediction: str, answers: list[str]) -> float:
    """Return 1.0 if the prediction contains one of the answers, ignoring case, punctuation, articles
    and extra spaces; else 0.0."""
    text = _normalised(prediction)
    return float(any(_normalised(answer) in text for answer in answers))


def _normalised(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and extra spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def places(size: int, count: int) -> list[int]:
    """Return `count` places evenly spread from 0 to size - 1, or fewer if size is less than count."""
    return sorted({round(n * (size - 1) / (count - 1)) for n in range(count)})


@dataclass(frozen=True)
class Question:
    """One prompt of a cell."""

    place: int | str
    """Index of the answer's pair or document, or the baseline's name."""
    prompt: str
    answers: list[str]
    """Any of these counts as right in generated text."""
    written: str
    """Continuation that is scored teacher-forced: the first answer in the format of the prompt."""


def questions(choices: LostInTheMiddle.Choices, cell: Cell) -> Iterator[Question]:
    """Yield one question with its answer at every place, and the baselines."""
    if cell["task"] == "kv":
        yield from _kv_questions(choices, cell)
    else:
        yield from _qa_questions(choices, cell)


def _kv_questions(choices: LostInTheMiddle.Choices, cell: Cell) -> Iterator[Question]:
    """Yield the question for a key's value."""
    size = cell["size"]
    pairs, wanted = _pairs(choices, cell)
    others = [pair for pair in pairs if pair != wanted][: size - 1]
    for place in places(size, choices.positions):
        shown = [*others[:place], wanted, *others[place:]]
        lines = ",\n ".join(f'"{key}": "{value}"' for key, value in shown)
        prompt = f'{KV}{{{lines}}}\n\nKey: "{wanted[0]}"\nCorresponding value:'
        yield Question(place, prompt, [wanted[1]], f' "{wanted[1]}')  # the closing quote is not scored


def _qa_questions(choices: LostInTheMiddle.Choices, cell: Cell) -> Iterator[Question]:
    """Yield the question about documents, and its two baselines."""
    size = cell["size"]
    asked = _document_question(choices, cell)
    end = f"Question: {asked.question}\nAnswer:"
    written = f" {asked.answers[0]}"
    for place in places(size, choices.positions):
        shown = [*asked.others[:place], asked.gold, *asked.others[place : size - 1]]
        yield Question(place, QA + _numbered(shown) + end, asked.answers, written)
    yield Question("closed book", end, asked.answers, written)
    yield Question("oracle", QA + _numbered([asked.gold]) + end, asked.answers, written)


def _numbered(documents: list[Pair]) -> str:
    """Return documents as the paper's prompt shows them; a document is a title and a text."""
    lines = [f"Document [{n}](Title: {title}) {text}\n" for n, (title, text) in enumerate(documents, 1)]
    return "".join(lines) + "\n"


class KvLine(BaseModel):
    """A line of the paper's kv-retrieval-N_keys.jsonl.gz."""

    ordered_kv_records: list[Pair]
    key: str
    value: str

    @model_validator(mode="after")
    def _holds_the_answer(self) -> KvLine:
        if (self.key, self.value) not in self.ordered_kv_records:
            raise ValueError(f"key {self.key!r} with its value is not among ordered_kv_records")
        return self


class Context(BaseModel):
    """A document of a QaLine."""

    title: str
    text: str
    isgold: bool | None = None
    hasanswer: bool | None = None


class QaLine(BaseModel):
    """A line of the paper's nq-open files."""

    question: str
    answers: list[str] = Field(min_length=1)
    ctxs: list[Context]


Line = TypeVar("Line", bound=BaseModel)


def _check_data(path: str, kind: type[BaseModel], trials: int) -> None:
    """Raise ValueError if a data file has fewer questions than `trials`, or another format."""
    found = sum(1 for _ in itertools.islice(_lines(path, kind), trials))
    if found < trials:
        raise ValueError(f"{path} has {found} questions, but trials asks for {trials}")


def _lines(path: str, kind: type[Line]) -> Iterator[Line]:
    """Yield the questions of one of the paper's data files.

    Raises:
        ValueError: the file is missing, or a line cannot be read; lines are counted from 1.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; leave it out to use invented questions")
    open_text = gzip.open if path.endswith(".gz") else open
    number = 0
    try:
        with open_text(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield _read_line(path, number, line, kind)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, line {number + 1}: {error}") from error


def _read_line(path: str, number: int, line: str, kind: type[Line]) -> Line:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        place = f"{dotted(first['loc'])}: " if first["loc"] else ""
        raise ValueError(f"{path}, line {number}: {place}{first['msg'].removeprefix('Value error, ')}") from error


def _question_of_file(path: str, kind: type[Line], number: int) -> Line:
    """Return one question of a data file, counted from 0."""
    return next(itertools.islice(_lines(path, kind), number, None))


def _pairs(choices: LostInTheMiddle.Choices, cell: Cell) -> tuple[list[Pair], Pair]:
    """Return (all pairs, the pair that is asked for)."""
    size = cell["size"]
    if choices.kv_data:
        line = _question_of_file(choices.kv_data, KvLine, cell["trial"])
        pairs = line.ordered_kv_records
        if len(pairs) < size:
            raise ValueError(
                f"{choices.kv_data}, line {cell['trial'] + 1} has {len(pairs)} pairs, but `pairs` asks for {size}"
            )
        return pairs, (line.key, line.value)
    chance = np.random.default_rng([choices.seed, size, cell["trial"]])
    drawn = [str(UUID(bytes=chance.bytes(16), version=4)) for _ in range(2 * size)]
    pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
    return pairs, pairs[int(chance.integers(size))]


@dataclass(frozen=True)
class _DocumentQuestion:
    """A question, its answers, the document with the answer, and other documents. A document is a
    title and a text."""

    question: str
    answers: list[str]
    gold: Pair
    others: list[Pair]


def _document_question(choices: LostInTheMiddle.Choices, cell: Cell) -> _DocumentQuestion:
    """Return a cell's question about documents, from the paper's file or about invented people."""
    if choices.qa_data:
        return _file_question(choices.qa_data, cell)
    return _invented_question(choices, cell)


def _file_question(path: str, cell: Cell) -> _DocumentQuestion:
    """Return a question of the paper's file, without other documents that also contain an answer."""
    size = cell["size"]
    line = _question_of_file(path, QaLine, cell["trial"])
    gold = []
    others = []
    for context in line.ctxs:
        document = (context.title, context.text)
        if context.isgold:
            gold.append(document)
        elif not context.hasanswer:
            others.append(document)
    if not gold or len(others) < size - 1:
        raise ValueError(
            f"{path}, line {cell['trial'] + 1} has {len(gold)} gold and {len(others)} other documents, but "
            f"`documents` asks for {size}"
        )
    return _DocumentQuestion(line.question, line.answers, gold[0], others)


def _invented_question(choices: LostInTheMiddle.Choices, cell: Cell) -> _DocumentQuestion:
    """Draw documents about invented buildings and their designers. The designer in the first one is
    asked for."""
    size: int = cell["size"]
    chance = np.random.default_rng([choices.seed, size, cell["trial"], 1])
    things = chance.choice(len(PLACES) * len(WORKS), size, replace=False).tolist()
    distractors = cell.get("distractors", choices.kinds()[0])
    if distractors != "mixed":
        place, work = things[0] % len(PLACES), things[0] // len(PLACES)
        shares = []
        for thing in chance.permutation(len(PLACES) * len(WORKS)).tolist():
            near = thing % len(PLACES) == place or thing // len(PLACES) == work
            if near == (distractors == "hard") and thing != things[0]:
                shares.append(thing)
        things = [things[0], *shares[: size - 1]]
    people = chance.choice(len(GIVEN) * len(FAMILY), size, replace=False).tolist()
    years = np.sort(chance.integers(1790, 1960, (size, 2))).tolist()
    buildings = []
    designers = []
    documents = []
    for thing, person, (begun, opened) in zip(things, people, years, strict=True):
        place, work = PLACES[thing % len(PLACES)], WORKS[thing // len(PLACES)]
        designer = f"{GIVEN[person % len(GIVEN)]} {FAMILY[person // len(GIVEN)]}"
        text = (
            f"The {work} of {place} was begun in {begun} and opened in {opened}. It was designed by {designer}, who "
            f"had drawn the plans in a single winter. Visitors remember it for its stone and for the view from its "
            f"roof."
        )
        buildings.append(f"{work} of {place}")
        designers.append(designer)
        documents.append((f"{place} {work}", text))
    return _DocumentQuestion(f"who designed the {buildings[0]}", [designers[0]], documents[0], documents[1:])
