"""Prompts read one after another; what the next one begins with is not computed again.

The cells of a grid differ in where a needle stands: what comes before it is the same text. So the
keys and values of the prompt before are kept up to the first token in which the two differ, and
only the rest is read. Of five depths spread evenly that leaves 70% of the work, of many 50%;
results are those of a fresh pass but for rounding.

An answer is scored in the same pass, teacher-forced: prompt and answer go in together, the head
runs on the answer's positions alone. Greedy decoding emits the answer's tokens if and only if each
is the argmax given those before it, so by induction the two agree on `correct`. NLL is finer than
right or wrong.

Legend: A tokens of the answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from longreach.evaluation.documents import text_ids
from longreach.evaluation.likelihood import check_ids, check_reach, forget_length, is_dynamic


def spelled(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, where: str, *, special: bool = True
) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt, and of the answer as the text goes on from it.

    A blank that is a token of its own belongs to the prompt: it tells nothing about the answer.

    Args:
        where: what is asked, for errors.
        special: put the tokenizer's first token before the prompt.

    Raises:
        ValueError: the tokenizer joins the prompt's end and the answer's beginning, so that no
        continuation of the
            prompt's tokens spells the answer.
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
    """Return how many tokens two texts have in common from their beginning on."""
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
    """Yield the tokens that follow `ids`, the one that ends the text included; the last one is not
    yet in the cache.

    Nothing but `choose` decides, whatever penalties or beams the model's own generation_config asks
    for.

    Args:
        cache: holds what was read before `ids`.
        choose: from the logits [V] of the next token to its id.
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
    """How a model answers a prompt."""

    nll: float
    """Mean NLL of the expected answer's tokens, in nats."""
    token_accuracy: float
    """Share of them that are the argmax, each given those before it."""
    correct: bool
    """Whether all of them are the argmax."""
    got: str
    """Greedy text: the generated one or, where nothing was generated, the argmax at each of the
    answer's positions."""
    read_tokens: int
    """How many tokens had to be read for it."""

    def as_row(self) -> dict[str, float | bool | str]:
        """Return the columns that an evaluation's case keeps."""
        return {"got": self.got, "correct": self.correct, "token_accuracy": self.token_accuracy, "nll": self.nll}


class Reader:
    """Reads prompts in turn, one model. Make one for the prompts that share a beginning: its cache
    stays in memory."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, reuse: bool = True) -> None:
        """Start with an empty cache; reuse: take up what two prompts have in common, where the
        model allows it."""
        self.model = model
        self.tokenizer = tokenizer
        self.cache = DynamicCache(config=model.config)
        self.cached: list[int] = []
        """Token ids whose keys and values are in the cache."""
        # keys that were dropped from a window, or turned for another length, cannot be taken up
        # again
        croppable = all(type(layer) is DynamicLayer for layer in self.cache.layers)
        self.reuse = reuse and croppable and not is_dynamic(model)

    def answer(self, prompt: list[int], expected: list[int], where: str, *, new_tokens: int = 0) -> Answer:
        """Return how likely `expected` is after `prompt`, and what the model generates in
        new_tokens tokens (0: none).

        Raises:
            FloatingPointError: the logits are not finite.
            ValueError: an id has no embedding, or a token no position in the model's table.
        """
        ids = torch.tensor([*prompt, *expected[:-1]], device=self.model.device)
        check_ids(self.model, ids, where)
        check_reach(self.model, len(prompt) + max(len(expected), new_tokens) - 1, where)
        expected_A = torch.tensor(expected, device=self.model.device)
        with torch.inference_mode():
            shared = self._keep(shared_start(self.cached, prompt[:-1]))
            out = self.model(input_ids=ids[None, shared:], past_key_values=self.cache, logits_to_keep=len(expected))
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
        """Forget all but the first n tokens, or all of them where that cannot be; return how many
        are left."""
        if tokens and self.reuse:
            spare = len(self.cached) - tokens
            if spare:
                self.cache.crop(-spare)
            return tokens
        forget_length(self.model)
        self.cache = DynamicCache(config=self.model.config)
        return 0

    def _generate(self, prompt: list[int], new_tokens: int) -> str:
        """Return the greedy text after a prompt whose beginning is in the cache."""
        with torch.inference_mode():
            kept = self._keep(len(prompt) - 1)
        tokens = list(generated(self.model, self.cache, prompt[kept:], new_tokens, greedy))
        self.cached = [*prompt, *tokens[:-1]]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
