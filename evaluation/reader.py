"""Reads prompts one after another, without computing a shared prefix again.

The prompts of a grid differ in the place of a needle, and the text before it is the same. So the
keys and values of the previous prompt are kept up to the first token at which the two differ, and
only the rest is read. For five evenly spread depths this leaves 70% of the work, for many depths
50%. On a CPU, the rest attends without a mask. Results equal those of a fresh pass except for
rounding.

An answer is scored teacher-forced in the same pass: prompt and answer are read together, and the
head runs only on the positions of the answer. Greedy decoding emits the answer's tokens if and only
if each is the argmax given the tokens before it, so by induction both agree on `correct`. NLL is
finer than right or wrong.

Legend: A tokens of the answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from longreach.attention.hf import attending_by
from longreach.evaluation.documents import text_ids
from longreach.evaluation.likelihood import check_attention, check_ids, check_reach, forget_length, is_dynamic
from longreach.evaluation.small_cache import StreamedAttention


def spelled(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, where: str, *, special: bool = True
) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt, and of the answer as its continuation.

    A space that is a token of its own counts as part of the prompt, because it says nothing about
    the answer.

    Args:
        where: name of the question, for error messages.
        special: put the tokenizer's first token before the prompt.

    Raises:
        ValueError: the tokenizer joins the prompt's end and the answer's beginning, so no
            continuation of the prompt's tokens spells the answer.
    """
    before = text_ids(tokenizer, prompt, first=special)
    ids = text_ids(tokenizer, prompt + answer, first=special)
    if ids[: len(before)] != before or len(ids) == len(before):
        raise ValueError(f"{where}: the tokenizer joins {prompt[-8:]!r} and {answer!r} into one token")
    start = len(before)
    while len(ids) - start > 1 and not str(tokenizer.decode(ids[start : start + 1])).strip():
        start += 1
    return ids[:start], ids[start:]


def shared_start(ids: list[int], others: list[int]) -> int:
    """Return the length of the common prefix of two texts, in tokens."""
    shared = 0
    for a, b in zip(ids, others, strict=False):
        if a != b:
            break
        shared += 1
    return shared


def generated(
    model: PreTrainedModel,
    cache: Cache,
    ids: list[int],
    new_tokens: int,
    choose: Callable[[torch.Tensor], int],
) -> Iterator[int]:
    """Yield the tokens that follow `ids`, including the end token. The last one is not yet in the
    cache.

    Only `choose` selects tokens; penalties and beams in the model's generation_config are ignored.

    Args:
        cache: keys and values of the tokens before `ids`.
        choose: returns the id of the next token, given its logits [V].
    """
    ends = model.generation_config.eos_token_id
    stop = {*ends} if isinstance(ends, list) else {ends}
    for _ in range(new_tokens):
        with torch.inference_mode():
            x_1T = torch.tensor([ids], device=model.device)
            token = choose(model(x_1T, past_key_values=cache, logits_to_keep=1).logits[0, -1])
        yield token
        if token in stop:
            return
        ids = [token]


def greedy(logits_V: torch.Tensor) -> int:
    """Return the most likely token."""
    return int(logits_V.argmax())


@dataclass(frozen=True)
class Answer:
    """A model's answer to a prompt, and its scores."""

    nll: float
    """Mean NLL of the expected answer's tokens, in nats."""
    token_accuracy: float
    """Share of these tokens that are the argmax, each given the tokens before it."""
    correct: bool
    """Whether all of these tokens are the argmax."""
    got: str
    """The generated greedy text or, if nothing was generated, the argmax at each position of the
    expected answer."""
    read_tokens: int
    """Number of tokens that had to be read."""

    def as_row(self) -> dict[str, float | bool | str]:
        """Return the columns that an evaluation's case keeps."""
        return {"got": self.got, "correct": self.correct, "token_accuracy": self.token_accuracy, "nll": self.nll}


def _is_replaceable(model: PreTrainedModel) -> bool:
    """Return whether another function can compute the model's attention."""
    try:
        check_attention(model)
    except ValueError:
        return False
    return True


class Reader:
    """Reads prompts of one model in turn. Create one for each group of prompts that share a prefix,
    because its cache stays in memory."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, reuse: bool = True) -> None:
        """Start with an empty cache.

        reuse: reuse the prefix that two prompts share, if the model allows it.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.cache = DynamicCache(config=model.config)
        self.cached: list[int] = []
        """Token ids whose keys and values are in the cache."""
        # keys that were dropped from a window, or rotated for another length, cannot be reused
        croppable = all(type(layer) is DynamicLayer for layer in self.cache.layers)
        self.reuse = reuse and croppable and not is_dynamic(model)
        self.continues = self.reuse and model.device.type == "cpu" and _is_replaceable(model)
        """Whether the rest of a prompt can be read without a mask."""

    def answer(self, prompt: list[int], expected: list[int], where: str, *, new_tokens: int = 0) -> Answer:
        """Score `expected` after `prompt`, and generate new_tokens tokens (0: none).

        Raises:
            FloatingPointError: the logits are not finite.
            ValueError: an id has no embedding, or the text exceeds the model's table of positions.
        """
        ids = torch.tensor([*prompt, *expected[:-1]], device=self.model.device)
        check_ids(self.model, ids, where)
        check_reach(self.model, len(prompt) + max(len(expected), new_tokens) - 1, where)
        expected_A = torch.tensor(expected, device=self.model.device)
        with torch.inference_mode():
            shared = self._keep(shared_start(self.cached, prompt[:-1]))
            whole = StreamedAttention(self.model, sinks=0, window=len(ids), positions="text")
            with attending_by(self.model, "continued", whole) if shared and self.continues else nullcontext():
                out = self.model(input_ids=ids[None, shared:], past_key_values=self.cache, logits_to_keep=len(expected))
            if self.reuse and self.cache.get_seq_length() != len(ids):
                raise ValueError(
                    f"{where}: {type(self.model).__name__} does not store its keys and values in the cache that it is "
                    f"given, so it cannot read prompts; use a model of another family"
                )
            logits_AV = out.logits[0].float()
            nll_A = torch.nn.functional.cross_entropy(logits_AV, expected_A, reduction="none")
        if not torch.isfinite(nll_A).all():
            raise FloatingPointError(f"{where}: the logits of the answer's tokens are not finite; check the weights")
        got_A = logits_AV.argmax(-1)
        hit_A = got_A == expected_A
        self.cached = ids.tolist()
        got = str(self.tokenizer.decode(got_A)).strip()
        if new_tokens:
            got = self._generate(prompt, new_tokens)
        return Answer(
            nll=float(nll_A.double().mean()),
            token_accuracy=float(hit_A.double().mean()),
            correct=bool(hit_A.all()),
            got=got,
            read_tokens=len(ids) - shared,
        )

    def _keep(self, tokens: int) -> int:
        """Crop the cache to this many tokens, or empty it if it cannot be cropped; return the number of
        tokens left."""
        if tokens and self.reuse:
            spare = len(self.cached) - tokens
            if spare:
                self.cache.crop(-spare)
            return tokens
        forget_length(self.model)
        self.cache = DynamicCache(config=self.model.config)
        return 0

    def _generate(self, prompt: list[int], new_tokens: int) -> str:
        """Return the greedy text after a prompt that the cache has at least in part."""
        with torch.inference_mode():
            kept = self._keep(len(prompt) - 1)
        tokens = list(generated(self.model, self.cache, prompt[kept:], new_tokens, greedy))
        self.cached = [*prompt, *tokens[:-1]]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
