"""Typed summaries of trainings, packed corpora and measured costs, stored as a JSON file in each
folder.

All code that needs the cost of a training, or the number of rows in a corpus, reads these classes;
no other code knows the files' names or keys. This module does not import torch, so that `longreach
plan` loads it in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from longreach.training.corpus_recipe import PackRecipe
from longreach.training.cost import Machine, Prediction
from longreach.training.recipe import FinetuneStageRecipe, PretrainStageRecipe


class Facts(BaseModel):
    """Base of frozen records that reject unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON types, for manifests."""
        return self.model_dump(mode="json")


class Summary(Facts):
    """Facts that are stored in their own file next to the result."""

    file: ClassVar[str]

    @classmethod
    def read(cls, folder: Path | str) -> Self:
        """Read the file in `folder`. OSError if it is missing, ValueError if its content is
        invalid."""
        path = Path(folder) / cls.file
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"{path} is not what this version of longreach writes: {place}: {first['msg']}"
                f" ({error.error_count()} such problems)"
            ) from error

    def write(self, folder: Path | str) -> None:
        """Write the file into `folder`."""
        text = json.dumps(self.to_json(), indent=1) + "\n"
        (Path(folder) / self.file).write_text(text, encoding="utf-8")


class TrainableParameters(Facts):
    """Number of parameters that an arm trains, by kind. A tied weight counts once."""

    total: int
    lora: int
    embed: int  # in the input embedding
    norm: int
    other: int  # in the layers' own matrices and an untied head


class TrainingSummary(Summary, FinetuneStageRecipe, PretrainStageRecipe):
    """Choices, cost and losses of a training: training.json next to the trained weights.

    It has the choices of both training stages; those of the other stage keep their defaults.
    """

    file: ClassVar[str] = "training.json"

    kind: Literal["finetune", "pretrain"]
    steps: int  # optimizer steps, including skipped ones
    skipped_steps: int
    tokens: int  # tokens read in all steps
    targets: int  # tokens that were predicted and count in the loss
    wall_s: float
    """Seconds of all optimizer steps, without startup, checkpoints, validation and saving."""
    checkpoints_s: float
    step_s_median: float  # seconds of the median step, without the first step, which warms up
    tokens_per_s: float
    """Tokens of all ranks per second, if each step took the median time of the steps with the same
    attention pattern and part of the curriculum."""
    loss_first: float  # loss of the first trained step, in nats per target
    loss_last: float
    total_parameters: int  # parameters of the model, including LoRA's
    trainable: TrainableParameters
    machine: Machine | None
    """Measured speed of a rank; None if the cost model does not know the architecture."""
    predicted: Prediction | None
    """Cost of a step as predicted before the first one; None as above."""
    peak_gib: float  # peak memory in GiB, summed over the ranks: of their GPUs, else of their processes
    ranks: int
    kernel: str  # how attention was computed (attention/kernels.py)
    pattern: str  # the attention pattern of the first step
    pattern_at_the_end: str
    """The attention pattern of the last step, which differs if the arm anneals."""
    resumed_from_step: int
    """Steps that were already done when this attempt began; 0 for a fresh start."""
    left_after_step: int
    """The step whose weights were saved: the last, or the one with the lowest validation loss."""
    notes: tuple[str, ...]  # checkpoints that were skipped when this attempt began, and why


class BadEntry(Facts):
    """A malformed entry that was skipped, and why."""

    file: str
    line: int  # line or row, counted from 1
    reason: str


class BadEntries(Facts):
    """The malformed entries of the sources."""

    count: int
    fraction: float  # malformed entries over all entries
    listed: tuple[BadEntry, ...] = ()
    """The first corpus.MAX_LISTED of them; manifests leave them out."""


class LengthBin(Facts):
    """Number of documents with more than `up_to` / 2 and at most `up_to` tokens, by split."""

    up_to: int
    train: int
    validation: int
    test: int

    @property
    def count(self) -> int:
        """Number of documents in all splits."""
        return self.train + self.validation + self.test


class ContextBin(Facts):
    """Number of targets that see more than `up_to` / 2 and at most `up_to` tokens before them."""

    up_to: int
    targets: int


class SourceShare(Facts):
    """What one source contributes to the rows, in training documents and tokens of their text."""

    source: str  # where its documents come from, as written in the recipe
    weight: float
    documents: int
    tokens: int
    left_out: int  # number of these documents that are shorter than min_tokens or longer than max_tokens
    packed_documents: int  # documents in the rows, including repeats
    packed_tokens: int

    @property
    def repeats(self) -> float:
        """How often a token that is not left out occurs in the rows, on average."""
        return self.packed_tokens / self.tokens if self.tokens else 0.0


class ChatShare(Facts):
    """Counts of chats. `cut` and `left_out` only count training chats, which have to fit a row."""

    count: int = 0
    tokens: int = 0  # tokens that were kept
    predicted: int = 0
    """Number of these tokens in the assistant's answers. All others are no targets."""
    cut: int = 0  # chats longer than a row, which lost their last turns
    cut_tokens: int = 0
    left_out: int = 0  # number of cut chats whose first answer ends beyond a row


class Overlap(Facts):
    """A held-out document of which training documents nearly repeat a part."""

    document: str
    split: str
    share: float  # fraction of its 5-word sequences in passages that training documents nearly repeat
    nearest: str  # the training document that repeats most of it
    nearest_share: float


class PackSummary(Summary, PackRecipe):
    """How documents were packed into rows: packed.json in a PackedCorpus folder."""

    file: ClassVar[str] = "packed.json"

    first_token_id: int | None
    """The token at the start of each row or isolated document; None for `first_token: none`."""
    eos_token_id: int
    pad_token_id: int
    vocab_size: int  # tokens of the tokenizer
    tokenizer_sha256: str  # digest of its tokenizer.json
    rows: int
    tokens: int  # tokens in the rows, without padding
    efficiency: float  # fraction of the rows that is not padding
    documents: dict[str, int]  # number of documents by split (train, validation, test)
    source_digest: str  # identity of the texts (training/documents.py)
    document_tokens: dict[str, int]  # tokens of the documents' text by split
    longer_than_a_row: int  # training documents that had to be split over rows
    truncated_tokens: int
    """Tokens lost from chats whose last turns did not fit. Texts lose none, since they continue in
    another row."""
    length_histogram: tuple[LengthBin, ...]
    contexts: tuple[ContextBin, ...] = ()
    """Targets by how many tokens of their own document (of their row, if joined) they see. Empty if
    an older version packed the corpus."""
    chats: ChatShare | None = None
    """The conversations among the documents; None: there are none."""
    sources: tuple[SourceShare, ...] = ()
    """The mixture, in the recipe's order. Empty if an older version packed the corpus."""
    overlaps: tuple[Overlap, ...] | None = None
    """The held-out documents that training documents repeat most, at most a few of them; None: not
    checked."""
    bad: BadEntries


class HeldOutSummary(Summary):
    """The held-out documents alone: held_out.json in a HeldOutDocuments folder."""

    file: ClassVar[str] = "held_out.json"

    documents: dict[str, int]  # number of documents by split (validation, test)
    tokens: int  # tokens of their text
    packages: tuple[str, ...]
    """The packages, generated rules and datasets among their sources; files and repositories may be
    anywhere, and are left out."""
    source_digest: str  # identity of the texts (training/documents.py)
    bad: BadEntries


class CostCell(Facts):
    """Measured cost of some steps of one arm at one row length, in one round."""

    length: int  # tokens in a row
    round: int  # counted from 0
    arm: str
    tokens: int = 0  # tokens in one step, over all ranks
    seconds: tuple[float, ...] = ()
    """Seconds of each timed step."""
    peak_gib: float = 0.0  # as in TrainingSummary
    predicted_s: float | None = None
    """Seconds of a step that the planner predicted from the measured speed of these ranks; None if
    it cannot predict them."""
    predicted_gib: float | None = None
    kernel: str = ""
    left_out: str = ""  # why nothing was measured; empty if it was measured

    @property
    def step_s(self) -> float:
        return median(self.seconds)


class Spread(NamedTuple):
    """The median, minimum and maximum of some measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


class CostsSummary(Summary):
    """Measured cost of every arm by row length: costs.json of the stage `costs`."""

    file: ClassVar[str] = "costs.json"

    yardstick: str  # the arm that the others are compared with
    steps: int  # timed steps of a measurement; one untimed step precedes them
    rounds: int
    ranks: int
    cells: tuple[CostCell, ...]
    """Measurements in the order in which they were made."""

    @property
    def lengths(self) -> list[int]:
        return list(dict.fromkeys(cell.length for cell in self.cells))

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    def of(self, length: int, arm: str) -> list[CostCell]:
        """Return an arm's measurements at a length, by round; none if the arm was left out."""
        return [cell for cell in self.cells if (cell.length, cell.arm) == (length, arm) and not cell.left_out]

    def seconds_per_1k(self, length: int, arm: str) -> Spread | None:
        """Return the seconds per 1,000 tokens over the steps of all rounds; None if the arm was
        left out."""
        seconds = [1000 * s / cell.tokens for cell in self.of(length, arm) for s in cell.seconds]
        return Spread.of(seconds) if seconds else None

    def peak_gib(self, length: int, arm: str) -> Spread | None:
        """Return the peak memory in GiB over the rounds; None if the arm was left out."""
        peaks = [cell.peak_gib for cell in self.of(length, arm)]
        return Spread.of(peaks) if peaks else None

    def predicted(self, length: int, arm: str) -> tuple[float, float] | None:
        """Return the prediction in seconds per 1,000 tokens and GiB; None if there is none."""
        seconds, gib = [], []
        for cell in self.of(length, arm):
            if cell.predicted_s is not None and cell.predicted_gib is not None:
                seconds.append(1000 * cell.predicted_s / cell.tokens)
                gib.append(cell.predicted_gib)
        return (median(seconds), median(gib)) if seconds else None

    def times_as_fast(self, length: int, arm: str, other: str) -> Spread | None:
        """Return how many times as fast as another arm this arm is, over the rounds; None if one of
        them was left out.

        Only steps of the same round are compared. They ran within minutes of each other, so a
        longer disturbance of the machine cancels out.
        """
        theirs = {cell.round: cell.step_s for cell in self.of(length, other)}
        ratios = [theirs[cell.round] / cell.step_s for cell in self.of(length, arm) if cell.round in theirs]
        return Spread.of(ratios) if ratios else None
