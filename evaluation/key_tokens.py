"""Key tokens: the few tokens that a long context predicts much better than a short one.

LongPPL (arXiv:2410.23771) reports that the perplexity of these tokens follows the results of
long-context benchmarks closely, while the perplexity of all tokens hardly does. A token is a key
token if its gain from context is above KEY_GAIN nats, and its NLL in the long context is below
KEY_NLL.

Here the untrained base chooses them, within its trained length, and all models are scored on the same
tokens, so no trained model chooses its own. But the base's own NLL on them is biased by the choice:
too low at the longer context and too high at the shorter one. So the other models are to be compared
with each other, and no difference to the base is shown.

    >>> key_positions({"2048": [3.0, 0.2, 9.0], "8192": [0.5, 0.1, 4.0]}, 2048, 8192)
    [0]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from longreach.evaluation.scores import EvalScores

if TYPE_CHECKING:
    from longreach.evaluation.base import Background
    from longreach.evaluation.blocks import Table

KEY_GAIN = 2.0
"""Lower bound of a key token's gain in nats."""
KEY_NLL = 2.0
"""Upper bound of a key token's NLL in the longer context, in nats."""
MIN_KEY_TOKENS = 10
"""Minimum number of key tokens for a table."""

Window = tuple[str, int]
"""A document, and the token position at which the window ends."""


def key_positions(nll: Mapping[str, Sequence[float]], short: int, long: int) -> list[int]:
    """Return the positions of the key tokens of a window from its tokens' NLL in nats by length."""
    found = []
    for position, (before, after) in enumerate(zip(nll[str(short)], nll[str(long)], strict=True)):
        if before - after > KEY_GAIN and after < KEY_NLL:
            found.append(position)
    return found


def key_nll(scores: EvalScores, keys: Mapping[Window, Sequence[int]], length: int) -> float | None:
    """Return the mean NLL of the key tokens at a context length; None if the model did not score all
    of them.

    Args:
        keys: for each window, the positions counted from the last token, which is -1.
    """
    nll_of = {(case["document"], case["end"]): case["nll"].get(str(length), ()) for case in scores.cases}
    found = []
    for window, positions in keys.items():
        nll = nll_of.get(window, ())
        if positions and len(nll) < -min(positions):
            return None
        found += [nll[position] for position in positions]
    return math.fsum(found) / len(found)


def key_table(by_arm: Mapping[str, Sequence[EvalScores]], background: Background) -> list[Table]:
    """Return the table of the key tokens' mean NLL: a line for each model, a column for each context
    length.

    There is no table if the base was not measured at two lengths within its trained length, or if it
    has fewer than MIN_KEY_TOKENS key tokens.

    Args:
        by_arm: the scores of each model, or of each seed of an arm.
        background: names the base and its trained length.
    """
    from longreach.evaluation.blocks import Table
    from longreach.evaluation.sections import DASH, with_commas

    (base,) = by_arm.get(background.base or "", [None])
    if base is None:
        return []
    most = background.trained_length
    measured = base.distinct("length", kind="pooled", split="test")
    lengths = sorted(length for length in measured if most is None or length <= most)
    if len(lengths) < 2:
        return []
    short, long = lengths[0], lengths[-1]
    keys, scored = {}, 0
    for case in base.cases:
        tokens = len(case["nll"][str(long)])  # an earlier version stored only the last ones
        scored += tokens
        keys[case["document"], case["end"]] = [at - tokens for at in key_positions(case["nll"], short, long)]
    count = sum(map(len, keys.values()))
    if count < MIN_KEY_TOKENS:
        return []
    cells: dict[str, dict[int, str]] = {}
    for name, seeds in by_arm.items():
        for length in seeds[0].distinct("length", kind="pooled", split="test"):
            found = [key_nll(scores, keys, length) for scores in seeds]
            nll = [value for value in found if value is not None]
            if len(nll) == len(seeds):
                cells.setdefault(name, {})[length] = f"{math.fsum(nll) / len(nll):.3f}"
    columns = sorted({length for of_model in cells.values() for length in of_model})
    lines = [[name, *(of_model.get(length, DASH) for length in columns)] for name, of_model in cells.items()]
    caption = (
        f"Key tokens: the {count:,} of {scored:,} that the base predicts more than {KEY_GAIN:g} nats better with "
        f"{long:,} tokens of context than with {short:,}, and with an NLL below {KEY_NLL:g} (mean NLL in nats)"
    )
    legend = (
        "As in LongPPL, but chosen by the untrained base for all models. Compare the other models with each other: "
        f"the choice makes the base look better at {long:,} tokens, and worse at {short:,}, than it is."
    )
    missing = [name for name in by_arm if name not in cells]
    if missing:
        legend += f" Left out, because their scores do not have these tokens: {', '.join(missing)}."
    return [Table(caption, ["model", *with_commas(columns)], lines, legend=legend)]
