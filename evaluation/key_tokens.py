"""Key tokens: the few tokens that a long context predicts much better than a short one.

LongPPL (arXiv:2410.23771) reports that the perplexity of these tokens follows the results of
long-context benchmarks closely, while the perplexity of all tokens hardly does. A token is a key
token if its gain from context is above KEY_GAIN nats, and its NLL in the long context is below
KEY_NLL.

Here the untrained base chooses them, within its trained length, and all models are scored on the same
tokens, so no trained model chooses its own. The base looks better at the length that chose them than
it is, because the tokens were chosen for their low NLL there.

    >>> key_positions({"2048": [3.0, 0.2, 9.0], "8192": [0.5, 0.1, 4.0]}, 2048, 8192)
    [0]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from longreach.evaluation.repeats import repeated, repeated_cell
from longreach.evaluation.scores import EvalScores, Row

if TYPE_CHECKING:
    from longreach.evaluation.base import Background
    from longreach.evaluation.blocks import Table

KEY_GAIN = 2.0
"""Lower bound of a key token's gain in nats."""
KEY_NLL = 2.0
"""Upper bound of a key token's NLL in the longer context, in nats."""
FEWEST = 10
"""Minimum number of key tokens for a table."""

Window = tuple[str, int, int]
"""A document, the token position at which the window ends, and the number of scored tokens."""


def key_positions(nll: Mapping[str, Sequence[float]], short: int, long: int) -> list[int]:
    """Return the positions of the key tokens of a window from its tokens' NLL in nats by length."""
    found = []
    for position, (before, after) in enumerate(zip(nll[str(short)], nll[str(long)], strict=True)):
        if before - after > KEY_GAIN and after < KEY_NLL:
            found.append(position)
    return found


def _windows(scores: EvalScores) -> dict[Window, Row]:
    """Return the cases of a model that have single tokens."""
    found = {}
    for case in scores.cases:
        tokens = len(next(iter(case["nll"].values())))
        found[case["document"], case["end"], tokens] = case
    return found


def key_rows(scores: EvalScores, keys: Mapping[Window, Sequence[int]], length: int) -> list[Row] | None:
    """Return a row for each window with key tokens: their number, and their mean NLL at a context
    length. None if the model did not score the same tokens."""
    windows = _windows(scores)
    rows = []
    for window, positions in keys.items():
        nll = windows.get(window, {}).get("nll", {}).get(str(length))
        if nll is None:
            return None
        if positions:
            mean = math.fsum(nll[position] for position in positions) / len(positions)
            rows.append({"document": window[0], "tokens": len(positions), "nll": mean})
    return rows


def key_table(by_arm: Mapping[str, Sequence[EvalScores]], background: Background) -> list[Table]:
    """Return the table of the key tokens' NLL: a line for each model, a column for each context
    length.

    There is no table if the base was not measured at two lengths within its trained length, or if it
    has fewer than FEWEST key tokens.

    Args:
        by_arm: the scores of each model, or of each seed of an arm.
        background: names the base and its trained length.
    """
    from longreach.evaluation.blocks import Table
    from longreach.evaluation.sections import DASH, with_commas

    (base,) = by_arm.get(background.base or "", [None])
    if base is None:
        return []
    measured = base.distinct("length", kind="pooled", split="test")
    most = background.trained_length
    lengths = sorted(length for length in measured if most is None or length <= most)
    if len(lengths) < 2:
        return []
    short, long = lengths[0], lengths[-1]
    keys = {window: key_positions(case["nll"], short, long) for window, case in _windows(base).items()}
    count, scored = sum(map(len, keys.values())), sum(tokens for _, _, tokens in keys)
    yardstick = key_rows(base, keys, long)
    if count < FEWEST or yardstick is None:
        return []
    columns: dict[int, None] = {}
    cells: dict[str, dict[int, str]] = {}
    for name, seeds in by_arm.items():
        for length in seeds[0].distinct("length", kind="pooled", split="test"):
            ours = [rows for scores in seeds if (rows := key_rows(scores, keys, length)) is not None]
            one = repeated(ours, yardstick) if len(ours) == len(seeds) else None
            if one:
                columns[length] = None
                cells.setdefault(name, {})[length] = repeated_cell(one)
    shown = sorted(columns)
    lines = [[name, *(of_model.get(length, DASH) for length in shown)] for name, of_model in cells.items()]
    caption = (
        f"Key tokens: the {count:,} of {scored:,} that the base predicts more than {KEY_GAIN:g} nats better with "
        f"{long:,} tokens of context than with {short:,}, and with an NLL below {KEY_NLL:g} (NLL in nats per token)"
    )
    legend = (
        f"As in LongPPL, but chosen by the untrained base for all models. This favours the base at {long:,} tokens. In "
        f"small type: nats per token better than the base at {long:,} tokens, with the 95% interval over documents."
    )
    missing = [name for name in by_arm if name not in cells]
    if missing:
        legend += f" Left out, because their scores do not have these tokens: {', '.join(missing)}."
    return [Table(caption, ["model", *with_commas(shown)], lines, legend=legend)]
