"""What each evaluation measures, typed. No torch here: `longreach plan` reads this in milliseconds."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from longreach.infra.choices import Choices

Share = Annotated[float, Field(ge=0, le=1)]


class EvalRecipe(Choices):
    """Choices that every evaluation has."""

    models: tuple[str, ...] | None = None
    """Names of the models (baselines and arms) to evaluate; all of them without it."""
    seed: int = Field(default=0, ge=0)
    """Seeds whatever the evaluation draws."""


class PerplexityRecipe(EvalRecipe):
    """Perplexity by context length on held-out documents."""

    lengths: tuple[int, ...] = Field(default=(1024, 2048, 4096), min_length=1)
    """Context lengths in tokens, below and above the trained one."""
    documents: tuple[str, ...] = ("*",)
    """Names (shell patterns) of held-out documents; those shorter than a length do not count at that length."""
    last_tokens: int = Field(default=256, ge=1)
    """The `last_stride` protocol scores this many tokens at the end of each context."""


class PasskeyRecipe(EvalRecipe):
    """A key from 1 to 49,999 hidden in filler sentences (LongLoRA, section 4.2; 2305.16300)."""

    lengths: tuple[int, ...] = Field(default=(1024, 2048, 4096), min_length=1)
    """Prompt lengths in tokens."""
    depths: tuple[Share, ...] = Field(default=(0.1, 0.5, 0.9), min_length=1)
    """Where the key stands: 0 first, 1 last."""
    trials: int = Field(default=1, ge=1)
    """Keys tried for each length and depth."""


class NeedleRecipe(EvalRecipe):
    """A fact put into held-out text, asked for at the end (needle in a haystack, gkamradt)."""

    lengths: tuple[int, ...] = Field(default=(1024, 2048, 4096), min_length=1)
    """Prompt lengths in tokens."""
    depths: tuple[Share, ...] = ()
    """Where the needle stands: 0 first, 1 last; without it, depth_points of them."""
    depth_points: int = Field(default=5, ge=2)
    """How many depths, from 0 to 1."""
    depth_curve: Literal["linear", "sigmoid"] = "linear"
    """How they are spread: evenly, or denser at both ends."""
    needles: int = Field(default=1, ge=1, le=8)
    """Facts that are asked for; the first stands at the depth, the others evenly behind it."""
    distractors: int = Field(default=0, ge=0, le=64)
    """Facts about other towns, drawn into the text away from the tested depths."""
    trials: int = Field(default=1, ge=1)
    """Haystacks tried for each length."""
    documents: tuple[str, ...] = ("*",)
    """Names (shell patterns) of held-out documents that the haystack is made of."""
    new_tokens: int = Field(default=0, ge=0)
    """Also generate so many tokens and look for the numbers in them; 0: teacher-forced scoring alone."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Ask as a chat: if the model has a template for it, or else not at all (`always`), or never."""

    def every_depth(self) -> list[float]:
        """The depths, ascending."""
        if self.depths:
            return sorted(self.depths)
        even = [n / (self.depth_points - 1) for n in range(self.depth_points)]
        if self.depth_curve == "sigmoid":
            even = [1 / (1 + math.exp(-10 * (at - 0.5))) for at in even]
        return [round(at, 4) for at in even]


class LostInTheMiddleRecipe(EvalRecipe):
    """Something to be found among many of its kind, by where it stands (Lost in the Middle, 2307.03172)."""

    pairs: tuple[int, ...] = ()
    """Key-value retrieval among so many JSON pairs (the paper: 75, 140, 300); none: not measured."""
    documents: tuple[int, ...] = ()
    """Question answering over so many documents (the paper: 10, 20, 30); none: not measured."""
    positions: int = Field(default=5, ge=2)
    """Places at which the answer is tried, evenly spread from the first to the last."""
    trials: int = Field(default=4, ge=1)
    """Questions for each size; each is asked at every place."""
    new_tokens: int = Field(default=0, ge=0)
    """Also generate so many tokens (at least as many as the answer has) and look for the answer in them; 0: nothing is
    generated, scoring is teacher-forced alone."""
    kv_data: str | None = None
    """The paper's own kv-retrieval-N_keys.jsonl.gz (one size); without it, pairs are drawn."""
    qa_data: str | None = None
    """The paper's own nq-open file (gzipped JSON lines); without it, facts about invented people are."""

    @model_validator(mode="after")
    def _something(self) -> "LostInTheMiddleRecipe":
        if not self.pairs and not self.documents:
            raise ValueError("pairs and documents are both empty: say how many to search, e.g. pairs: [75]")
        if (least := min(*self.pairs, *self.documents, 1 << 30)) < 2:
            raise ValueError(f"pairs and documents of {least}: two at least, or there is no middle")
        return self


class SinksRecipe(EvalRecipe):
    """How much attention rests on the first tokens, by layer and head (StreamingLLM, figure 2)."""

    lengths: tuple[int, ...] = (16, 256)
    """Tokens of the texts."""
    texts: int = Field(default=256, ge=1)
    """Texts of the shortest length; longer ones are fewer, so that all have the same number of tokens."""
    first_tokens: int = Field(default=4, ge=1)
    """How many first tokens are looked at."""
    map_layers: tuple[int, ...] = (0, 1, 2, -1)
    """Layers whose attention is drawn, at the shortest length."""


class HarnessRecipe(EvalRecipe):
    """Tasks of EleutherAI's lm-evaluation-harness: LongBench, LongBench v2, RULER and all others (extra `eval`)."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """The harness's names of tasks or groups, e.g. longbench_qasper."""
    limit: int | None = Field(default=None, ge=1)
    """Documents of each task; all without it."""
    max_length: int | None = Field(default=None, ge=16)
    """Tokens that a prompt may have, the middle of longer ones is cut out; the model's own context without it."""
    data: str | None = None
    """A folder with tasks of its own (YAML files, local data), read beside the harness's."""
    task_arguments: dict[str, str | int | tuple[int, ...]] = Field(default_factory=dict)
    """What tasks are told (RULER: max_seq_lengths)."""


class StreamingRecipe(EvalRecipe):
    """StreamingLLM's four ways through one text (2309.17453, figure 3)."""

    document: str = "*"
    """Held-out document (name, or a shell pattern whose first match is taken)."""
    tokens: int = Field(default=1024, ge=2)
    """Tokens of it that are scored."""
    cache_tokens: int = Field(default=256, ge=2)
    """Keys that each way keeps, sinks included (dense keeps all)."""
    sink_tokens: tuple[int, ...] = Field(default=(4,), min_length=1)
    """How many first tokens the sink cache keeps; each number is a way of its own."""
    ways: tuple[Literal["dense", "window", "recompute", "sinks"], ...] = Field(
        default=("dense", "window", "recompute", "sinks"), min_length=1
    )
    """Which of the four."""
    recompute_every: int = Field(default=16, ge=1)
    """The `recompute` way scores every n-th token, as each needs a pass over its own window; 1 scores all."""
    positions: tuple[Literal["cache", "text"], ...] = Field(default=("cache",), min_length=1)
    """Where sinks' positions are counted: inside the cache (the paper's way) or in the text; a way each."""
    newlines: bool = False
    """Also with the sinks' own tokens replaced by line breaks: is it their place or their meaning?"""
    latency_tokens: int = Field(default=0, ge=0)
    """Decode so many tokens one by one in each way, and time them; 0: no latencies."""
    endurance_tokens: int = Field(default=0, ge=0)
    """Stream so many tokens of all documents through one sink cache; 0: not."""

    @model_validator(mode="after")
    def _fits(self) -> "StreamingRecipe":
        if self.latency_tokens and self.latency_tokens + self.cache_tokens + 1 >= self.tokens:
            raise ValueError(
                f"latency_tokens {self.latency_tokens} and cache_tokens {self.cache_tokens} before them do not fit "
                f"into tokens {self.tokens}: lower latency_tokens or score more tokens"
            )
        if min(self.sink_tokens) < 1 or len({*self.sink_tokens}) < len(self.sink_tokens):
            raise ValueError(f"sink_tokens {list(self.sink_tokens)}: each number once, from 1 (none: way 'window')")
        if (most := max(self.sink_tokens)) >= self.cache_tokens:
            raise ValueError(
                f"sink_tokens {most} leave no room for recent tokens in cache_tokens {self.cache_tokens}: "
                f"use fewer sinks or a larger cache"
            )
        if self.cache_tokens >= self.tokens:
            raise ValueError(
                f"tokens {self.tokens} do not outgrow cache_tokens {self.cache_tokens}, so all ways would be the same: "
                f"score more tokens or use a smaller cache"
            )
        return self
