"""Generate questions on long documents from a seed: instructions with known correct answers.

Each chat shows an excerpt and asks one or more questions in turn: which sentence follows the quoted
one? The answer occurs word for word somewhere in the excerpt, so the model learns to look far back
for it. (LongLoRA's second stage, arXiv:2309.12307 section 4.1, trains on such instructions, but
written by people.)

    from longreach.training.questions import conversations
    next(conversations(QuestionsRecipe(about="sotu", chats=1), [("one", Path("one.txt"))]))
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from longreach.training.chats import Conversation, Message
from longreach.training.corpus_recipe import QuestionsRecipe

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
QUOTED_CHARS = (40, 300)
"""Fewest and most characters of a sentence in a question or answer, to exclude headings and very
long sentences."""


def conversations(recipe: QuestionsRecipe, files: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, Conversation]]:
    """Yield (document name, chat about it), cycling through the documents.

    An excerpt without a suitable sentence gives no chat. RandomState's stream is frozen (NumPy's
    NEP 19), so every version of NumPy draws the same numbers.
    """
    for number in range(recipe.chats):
        name, path = files[number % len(files)]
        random = np.random.RandomState([recipe.seed, number])
        sentences = SENTENCE_END.split(path.read_text(encoding="utf-8").strip())
        excerpt = _excerpt(sentences, recipe.chars, random)
        asked = [place for place in range(len(excerpt) - 1) if _good(excerpt, place) and _good(excerpt, place + 1)]
        if not asked:
            continue
        messages: list[Message] = []
        for place in random.permutation(asked)[: recipe.questions]:
            shown = "" if messages else f"Read this text.\n\n{' '.join(excerpt)}\n\n"
            question = f'{shown}Which sentence of the text comes right after "{excerpt[place]}"?'
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": excerpt[place + 1]}]
        yield name, Conversation(tuple(messages))


def _excerpt(sentences: Sequence[str], chars: int, random: np.random.RandomState) -> list[str]:
    """Return consecutive sentences of about `chars` characters from a random place in the text.

    A shorter text is returned as a whole.
    """
    ends = np.cumsum([len(sentence) + 1 for sentence in sentences])
    last = int(np.searchsorted(ends, max(0, ends[-1] - chars)))  # a later start would give a shorter excerpt
    first = random.randint(last + 1)
    before = ends[first] - len(sentences[first]) - 1
    return [" ".join(one.split()) for one in sentences[first : int(np.searchsorted(ends, before + chars)) + 1]]


def _good(excerpt: Sequence[str], place: int) -> bool:
    """Return whether a sentence has a suitable length and occurs only once in the excerpt."""
    few, many = QUOTED_CHARS
    return few <= len(excerpt[place]) <= many and excerpt.count(excerpt[place]) == 1
