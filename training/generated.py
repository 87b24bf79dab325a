"""Documents that a rule makes from a seed: texts whose right prediction is known, for controls of
what is measured.

Bigram-Backcopy (Guo et al., "Active-Dormant Attention Heads", arXiv:2410.13835, section 2) is the
smallest task on which attention sinks form. Each document begins with the same symbol. Then the
next symbol is drawn by a bigram table, unless the current one is a trigger: after a trigger comes
the symbol before it, copied. A head that copies has work at triggers only, and has to put its
attention somewhere everywhere else.

    python -c "from longreach.training.generated import texts; from longreach.training.recipe import GeneratedRecipe
    print(next(texts(GeneratedRecipe(documents=1, tokens=40))))"

A symbol is one printable ASCII character: one token of any byte-level vocabulary without merges
(vocab_size 257).
"""

from __future__ import annotations

import string
from bisect import bisect
from collections.abc import Iterator

import numpy as np

from longreach.training.recipe import GeneratedRecipe

OPENING = "^"
"""The symbol that opens documents, and stands nowhere else."""
SYMBOLS = string.ascii_lowercase + string.ascii_uppercase + string.digits
"""The symbols in their order; the first ones are the triggers."""
CONCENTRATION = 0.1
"""Of the Dirichlet distribution that draws each row of the bigram table: about three likely
successors of 32."""


def names(recipe: GeneratedRecipe) -> list[str]:
    """Return the names of the documents, in order: the rule, the number of tokens, the document's
    own number."""
    return [f"{recipe.rule}-{recipe.tokens}-{n}" for n in range(recipe.documents)]


def texts(recipe: GeneratedRecipe) -> Iterator[str]:
    """Yield the documents, each of `tokens` symbols.

    The table depends on the seed and the numbers of symbols and triggers alone, so sources that
    differ in documents and tokens speak the same language. RandomState's numbers are frozen
    (NumPy's NEP 19): other versions draw the same.
    """
    table = np.random.RandomState([recipe.seed]).dirichlet([CONCENTRATION] * recipe.symbols, size=recipe.symbols)
    cumulative = table.cumsum(1)
    cumulative[:, -1] = 1  # but for rounding
    thresholds = cumulative.tolist()
    opening = OPENING if recipe.opening else ""
    for number in range(recipe.documents):
        random = np.random.RandomState([recipe.seed, recipe.tokens, number])
        first, *draws = random.random_sample(recipe.tokens - len(opening)).tolist()
        # the first symbol is no trigger: there is none before it to be copied
        before = current = recipe.triggers + int(first * (recipe.symbols - recipe.triggers))
        written = [opening, SYMBOLS[current]]
        for draw in draws:
            after = before if current < recipe.triggers else bisect(thresholds[current], draw)
            written.append(SYMBOLS[after])
            before, current = current, after
        yield "".join(written)
