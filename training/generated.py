"""Generate documents from a rule and a seed: texts with known correct predictions, as controls.

Bigram-Backcopy (Guo et al., "Active-Dormant Attention Heads", arXiv:2410.13835, section 2) is the
smallest task on which attention sinks form. Each document begins with the same symbol. Each next
symbol is drawn from a bigram table, except after a trigger: the symbol after a trigger is a copy of
the symbol before it. A head that copies has work at triggers only, and must put its attention
somewhere at all other symbols.

    python -c "from longreach.training.generated import texts
    from longreach.training.corpus_recipe import GeneratedRecipe
    print(next(texts(GeneratedRecipe(documents=1, tokens=40))))"

A symbol is one printable ASCII character, which is one token in a byte-level vocabulary without
merges (vocab_size 257).
"""

from __future__ import annotations

import string
from bisect import bisect
from collections.abc import Iterator

import numpy as np

from longreach.training.corpus_recipe import GeneratedRecipe

OPENING = "^"
"""The symbol that opens documents and occurs nowhere else."""
SYMBOLS = string.ascii_lowercase + string.ascii_uppercase + string.digits
"""All symbols in order; the first ones are the triggers."""
CONCENTRATION = 0.1
"""Concentration of the Dirichlet distribution from which each row of the bigram table is drawn. It
gives about three likely successors among 32."""


def names(recipe: GeneratedRecipe) -> list[str]:
    """Return the documents' names in order: rule, number of tokens, document number."""
    return [f"{recipe.rule}-{recipe.tokens}-{n}" for n in range(recipe.documents)]


def texts(recipe: GeneratedRecipe) -> Iterator[str]:
    """Yield the documents, each of `tokens` symbols.

    The table depends only on the seed and the number of symbols, so sources that differ
    only in documents and tokens share one language. RandomState's stream is frozen (NumPy's NEP 19),
    so every version of NumPy draws the same numbers.
    """
    table = np.random.RandomState([recipe.seed]).dirichlet([CONCENTRATION] * recipe.symbols, size=recipe.symbols)
    cumulative = table.cumsum(1)
    cumulative[:, -1] = 1  # correct the rounding
    thresholds = cumulative.tolist()
    opening = OPENING if recipe.opening else ""
    for number in range(recipe.documents):
        random = np.random.RandomState([recipe.seed, recipe.tokens, number])
        first, *draws = random.random_sample(recipe.tokens - len(opening)).tolist()
        # the first symbol is not a trigger, as there is no symbol before it to copy
        before = current = recipe.triggers + int(first * (recipe.symbols - recipe.triggers))
        written = [opening, SYMBOLS[current]]
        for draw in draws:
            after = before if current < recipe.triggers else bisect(thresholds[current], draw)
            written.append(SYMBOLS[after])
            before, current = current, after
        yield "".join(written)
