"""Prompts read one after another; what the next one begins with is not computed again.

The cells of a grid differ in where a needle stands: what comes before it is the same text. So the keys and values of
the prompt before are kept up to the first token in which the two differ (`DynamicCache.crop`), and only the rest is
read. For depths spread evenly over a text that halves the work; results are those of a fresh pass but for rounding.

An answer is scored in the same pass, teacher-forced: prompt and answer go in together, the head runs on the answer's
positions alone. Greedy decoding emits the answer's tokens if and only if each is the argmax given those before it, so
by induction the two agree on `correct`. NLL is finer than right or wrong: it moves long before the first key is found.

Legend: A tokens of the answer, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from evaluation.likelihood import check_ids, is_dynamic


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
        if shared and self.reuse:
            self._keep(shared)
        else:
            shared, self.cache = 0, DynamicCache(config=self.model.config)
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

    def _keep(self, tokens: int) -> None:
        """Forgets all but the first so many tokens."""
        if spare := len(self.held) - tokens:
            self.cache.crop(-spare)

    def _generate(self, prompt: list[int], new_tokens: int) -> str:
        """Greedy, from the prompt's keys that are already there."""
        if self.reuse:
            self._keep(len(prompt) - 1)
        else:
            self.cache = DynamicCache(config=self.model.config)
        ends = self.model.generation_config.eos_token_id
        last = ends[0] if isinstance(ends, list) else ends
        greedy = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=ends, pad_token_id=last or 0)
        generate: Any = self.model.generate
        ids_1T = torch.tensor([prompt], device=self.model.device)
        out_1T = generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), past_key_values=self.cache, generation_config=greedy
        )
        self.held = out_1T[0, :-1].tolist()
        return str(self.tokenizer.decode(out_1T[0, len(prompt) :], skip_special_tokens=True)).strip()
