"""Prompts read one after another; what the next one begins with is not computed again.

The cells of a grid differ in where a needle stands: what comes before it is the same text. So the keys and values of
the prompt before are kept up to the first token in which the two differ, and only the rest is read. Of five depths
spread evenly that leaves 70% of the work, of many 50%; results are those of a fresh pass but for rounding.

An answer is scored in the same pass, teacher-forced: prompt and answer go in together, the head runs on the answer's
positions alone. Greedy decoding emits the answer's tokens if and only if each is the argmax given those before it, so
by induction the two agree on `correct`. NLL is finer than right or wrong.

Legend: A tokens of the answer, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from longreach.evaluation.documents import text_ids
from longreach.evaluation.likelihood import check_ids, forget_length, is_dynamic


def spelled(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, where: str, *, special: bool = True
) -> tuple[list[int], list[int]]:
    """Ids of the prompt, after the tokenizer's first token or without it, and of the answer as it goes on from it.

    A blank that is a token of its own belongs to the prompt: it says nothing of the answer. ValueError where the
    tokenizer joins the prompt's end and the answer's beginning: then no continuation of its tokens spells the answer.
    """
    before, ids = (text_ids(tokenizer, text, first=special) for text in (prompt, prompt + answer))
    if ids[: len(before)] != before or len(ids) == len(before):
        raise ValueError(f"{where}: the tokenizer joins {prompt[-8:]!r} and {answer!r} into one token")
    while len(ids) - len(before) > 1 and not str(tokenizer.decode(ids[len(before) : len(before) + 1])).strip():
        before.append(ids[len(before)])
    return before, ids[len(before) :]


@dataclass(frozen=True)
class Answer:
    """What the model would say to a prompt."""

    nll: float
    """Mean NLL of the expected answer's tokens, in nats."""
    token_accuracy: float
    """Share of them that are the argmax, each given those before it."""
    correct: bool
    """All of them."""
    got: str
    """Greedy: what it generated, or, where nothing was generated, the argmax at each of the answer's positions."""
    read_tokens: int
    """How many tokens had to be read for it."""

    def as_row(self) -> dict[str, float | bool | str]:
        """As an evaluation's case keeps it."""
        return {"got": self.got, "correct": self.correct, "token_accuracy": self.token_accuracy, "nll": self.nll}


class Reader:
    """Reads prompts in turn, one model. Make one for the prompts that share a beginning: its cache stays in memory."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, reuse: bool = True) -> None:
        self.model, self.tokenizer = model, tokenizer
        fresh = DynamicCache(config=model.config)
        # keys that were dropped from a window, or turned for another length, cannot be taken up again
        croppable = all(type(layer) is DynamicLayer for layer in fresh.layers)
        self.reuse = reuse and croppable and not is_dynamic(model)
        self.held: list[int] = []
        self.cache = fresh

    @torch.inference_mode()
    def answer(self, prompt: list[int], expected: list[int], where: str, *, new_tokens: int = 0) -> Answer:
        """How the model takes `expected` after `prompt`, and what it generates in new_tokens tokens (0: nothing).

        FloatingPointError where the logits are not finite; ValueError where an id has no embedding.
        """
        ids = torch.tensor([*prompt, *expected[:-1]], device=self.model.device)
        check_ids(self.model, ids, where)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.held, prompt[:-1], strict=False)))
        shared = self._keep(shared)
        expected_A = torch.tensor(expected, device=self.model.device)
        out = self.model(input_ids=ids[None, shared:], past_key_values=self.cache, logits_to_keep=len(expected))
        logits_AV = out.logits[0].float()
        nll_A = torch.nn.functional.cross_entropy(logits_AV, expected_A, reduction="none")
        if not torch.isfinite(nll_A).all():
            raise FloatingPointError(f"{where}: the logits of the answer's tokens are not finite; check the weights")
        hit_A = (got_A := logits_AV.argmax(-1)) == expected_A
        self.held = ids.tolist()
        got = self._generate(prompt, new_tokens) if new_tokens else str(self.tokenizer.decode(got_A)).strip()
        return Answer(
            float(nll_A.double().mean()), float(hit_A.double().mean()), bool(hit_A.all()), got, len(ids) - shared
        )

    def _keep(self, tokens: int) -> int:
        """Forgets all but the first so many tokens, or all of them; returns how many are left."""
        if tokens and self.reuse:
            if spare := len(self.held) - tokens:
                self.cache.crop(-spare)
            return tokens
        forget_length(self.model)
        self.cache = DynamicCache(config=self.model.config)
        return 0

    def _generate(self, prompt: list[int], new_tokens: int) -> str:
        """Greedy and nothing else, whatever penalties or beams the model's own generation_config asks for."""
        ends = self.model.generation_config.eos_token_id
        stop, said = {*ends} if isinstance(ends, list) else {ends}, []
        ids = prompt[self._keep(len(prompt) - 1) :]
        for _ in range(new_tokens):
            x_1T = torch.tensor([ids], device=self.model.device)
            token = int(self.model(x_1T, past_key_values=self.cache, logits_to_keep=1).logits[0, -1].argmax())
            said.append(token)
            if token in stop:
                break
            ids = [token]
        self.held = [*prompt, *said[:-1]]
        return str(self.tokenizer.decode(said, skip_special_tokens=True)).strip()
