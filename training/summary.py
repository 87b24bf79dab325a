"""What trainings, packed corpora and measured costs say of themselves: typed facts, a JSON file in
each folder.

Everyone who wants to know what a training cost, or how many rows a corpus has, reads these classes;
nobody else knows the files' names or keys. No torch here: `longreach plan` reads them in
milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from longreach.training.cost import Machine, Prediction
from longreach.training.recipe import FinetuneStageRecipe, PackRecipe, PretrainStageRecipe


class Facts(BaseModel):
    """Frozen facts, strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON's own types, as manifests hold them."""
        return self.model_dump(mode="json")


class Summary(Facts):
    """Facts that lie in a file of their own beside the result."""

    file: ClassVar[str]

    @classmethod
    def read(cls, folder: Path | str) -> Self:
        """Return what the file in `folder` says; OSError if missing, ValueError if other."""
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
    """Numbers of parameters that an arm trains, by kind; a tied weight counts once."""

    total: int
    lora: int
    embed: int  # in the input embedding
    norm: int
    other: int  # in the layers' own matrices and an untied head


class TrainingSummary(Summary, FinetuneStageRecipe, PretrainStageRecipe):
    """What was trained, what it cost and how it went: training.json beside the trained weights.

    It holds the choices of both stages that train; those of the other stage keep their defaults.
    """

    file: ClassVar[str] = "training.json"

    kind: Literal["finetune", "pretrain"]
    steps: int  # optimizer steps, skipped ones included
    skipped_steps: int
    tokens: int  # tokens read in all steps
    targets: int  # tokens that were predicted, so that they count in the loss
    wall_s: float
    """Seconds of all optimizer steps, without start-up, checkpoints, validation and saving."""
    checkpoints_s: float
    step_s_median: float  # seconds of the median step; the first step, which warms up, is left out
    tokens_per_s: float
    """Tokens of all ranks per second, if each step took the median time of those with its attention
    pattern and part of a curriculum."""
    loss_first: float  # loss of the first trained step, in nats per target
    loss_last: float
    total_parameters: int  # parameters of the model, LoRA's included
    trainable: TrainableParameters
    machine: Machine | None
    """What a rank was measured to do; None where the cost model does not know the architecture."""
    predicted: Prediction | None
    """What a step was predicted to cost before the first one; None as above."""
    peak_gib: float  # peak memory, summed over the ranks: of their GPUs, else of their processes
    ranks: int
    kernel: str  # how attention was computed (attention/kernels.py)
    pattern: str  # the attention pattern of the first step
    pattern_at_the_end: str
    """The attention pattern of the last step, which differs where an arm anneals."""
    resumed_from_step: int
    """Steps that were already done when this attempt began; 0 for a fresh start."""
    left_after_step: int
    """The step whose weights were saved: the last, or the one with the lowest validation loss."""
    notes: tuple[str, ...]  # checkpoints that were passed over when this attempt began, and why


class BadEntry(Facts):
    """A malformed entry that was skipped, and why."""

    file: str
    line: int  # its line or row, from 1
    reason: str


class BadEntries(Facts):
    """How many entries of the sources were malformed."""

    count: int
    fraction: float  # malformed entries over all entries
    listed: tuple[BadEntry, ...] = ()
    """The first of them (corpus.MAX_LISTED); manifests leave them out."""


class LengthBin(Facts):
    """Numbers of documents that have more than half of `up_to` tokens, up to `up_to`."""

    up_to: int
    train: int
    validation: int
    test: int

    @property
    def count(self) -> int:
        """Return the number of documents of all splits."""
        return self.train + self.validation + self.test


class ContextBin(Facts):
    """Number of targets that see more than half of `up_to` tokens before them, up to `up_to`."""

    up_to: int
    targets: int


class SourceShare(Facts):
    """What one source gave to the rows, in training documents and tokens of their text."""

    source: str  # where its documents come from, as the recipe names it
    weight: float
    documents: int
    tokens: int
    left_out: int  # of these documents, those shorter than min_tokens or longer than max_tokens
    packed_documents: int  # documents in the rows, repeats counted
    packed_tokens: int

    @property
    def repeats(self) -> float:
        """Return how often a token that is not left out stands in the rows, on average."""
        return self.packed_tokens / self.tokens if self.tokens else 0.0


class ChatShare(Facts):
    """What became of chats; `cut` and `left_out` are of training chats, which have to fit a row."""

    count: int = 0
    tokens: int = 0  # tokens that were kept
    predicted: int = 0
    """Of these, tokens that the assistant says: the others are given, and no targets."""
    cut: int = 0  # chats longer than a row, which lost their last turns
    cut_tokens: int = 0
    left_out: int = 0  # of those that were cut, chats whose first answer ends beyond a row


class Overlap(Facts):
    """A held-out document that training documents nearly repeat in part."""

    document: str
    split: str
    share: float  # of its runs of 5 words, those in passages that training documents nearly repeat
    nearest: str  # the training document that repeats most of it
    nearest_share: float


class PackSummary(Summary, PackRecipe):
    """How documents became rows: packed.json in a PackedCorpus folder."""

    file: ClassVar[str] = "packed.json"

    first_token_id: int | None
    """The token at the start of each row or isolated document; None for `first_token: none`."""
    eos_token_id: int
    pad_token_id: int
    vocab_size: int  # tokens of the tokenizer
    tokenizer_sha256: str  # digest of its tokenizer.json
    rows: int
    tokens: int  # tokens in the rows, without padding
    efficiency: float  # share of the rows' places that hold a token
    documents: dict[str, int]  # number of documents by split (train, validation, test)
    source_digest: str  # identity of the texts (training/documents.py)
    document_tokens: dict[str, int]  # tokens of the documents' text by split
    longer_than_a_row: int  # training documents that had to be split over rows
    truncated_tokens: int
    """Tokens that were lost: of chats, whose last turns did not fit; of texts none, which go on in
    another row."""
    length_histogram: tuple[LengthBin, ...]
    contexts: tuple[ContextBin, ...] = ()
    """Targets by how many tokens of their own document (of their row, if joined) they see; empty
    in what an older version packed."""
    chats: ChatShare | None = None
    """The conversations among the documents; None: there are none."""
    sources: tuple[SourceShare, ...] = ()
    """The mixture, in the recipe's order; empty in what an older version packed."""
    overlaps: tuple[Overlap, ...] | None = None
    """Held-out documents of which training documents repeat most, the first of them; None: not
    looked for."""
    bad: BadEntries


class CostCell(Facts):
    """What some steps of one arm cost at one row length, in one round of the turns."""

    length: int  # tokens of a row
    round: int  # from 0
    arm: str
    tokens: int = 0  # of one step, over all ranks
    seconds: tuple[float, ...] = ()
    """Of each timed step."""
    peak_gib: float = 0.0  # as in TrainingSummary
    predicted_s: float | None = None
    """What the planner expected of a step, from what these ranks were measured to do; None where it
    cannot count."""
    predicted_gib: float | None = None
    kernel: str = ""
    left_out: str = ""  # why nothing was measured; empty if it was

    @property
    def step_s(self) -> float:
        return median(self.seconds)


class Spread(NamedTuple):
    """The median of some measurements, and the smallest and the greatest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


class CostsSummary(Summary):
    """What every arm costs by row length: costs.json of the stage `costs`."""

    file: ClassVar[str] = "costs.json"

    yardstick: str  # the arm that the others are compared with
    steps: int  # timed steps of a measurement; one more goes before them
    rounds: int
    ranks: int
    cells: tuple[CostCell, ...]
    """In the order in which they were measured."""

    @property
    def lengths(self) -> list[int]:
        return list(dict.fromkeys(cell.length for cell in self.cells))

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    def of(self, length: int, arm: str) -> list[CostCell]:
        """Return an arm's measurements at a length by round; none if it was left out."""
        return [cell for cell in self.cells if (cell.length, cell.arm) == (length, arm) and not cell.left_out]

    def seconds_per_1k(self, length: int, arm: str) -> Spread | None:
        """Return the seconds that 1,000 tokens take, over the steps of all rounds; None if it was
        left out."""
        seconds = [1000 * s / cell.tokens for cell in self.of(length, arm) for s in cell.seconds]
        return Spread.of(seconds) if seconds else None

    def peak_gib(self, length: int, arm: str) -> Spread | None:
        """Return the peak memory over the rounds; None if it was left out."""
        peaks = [cell.peak_gib for cell in self.of(length, arm)]
        return Spread.of(peaks) if peaks else None

    def predicted(self, length: int, arm: str) -> tuple[float, float] | None:
        """Return what was predicted, in seconds per 1,000 tokens and GiB; None if nothing was."""
        seconds, gib = [], []
        for cell in self.of(length, arm):
            if cell.predicted_s is not None and cell.predicted_gib is not None:
                seconds.append(1000 * cell.predicted_s / cell.tokens)
                gib.append(cell.predicted_gib)
        return (median(seconds), median(gib)) if seconds else None

    def times_as_fast(self, length: int, arm: str, other: str) -> Spread | None:
        """Return how many times as fast as another arm it is, over the rounds; None if one of them
        was left out.

        Only steps of one round are compared, which ran minutes apart: what disturbs the machine for
        longer cancels.
        """
        theirs = {cell.round: cell.step_s for cell in self.of(length, other)}
        ratios = [theirs[cell.round] / cell.step_s for cell in self.of(length, arm) if cell.round in theirs]
        return Spread.of(ratios) if ratios else None
