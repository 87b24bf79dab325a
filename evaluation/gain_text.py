"""Single tokens: the NLL of each, and the text of a few documents with each token coloured by its
gain from context: blue if the longest context predicts it better than the shortest, red if worse.

For each window of the test documents, `gain` keeps the NLL of every scored token at every length, one
window per line of cases.jsonl. For the first KEPT_DOCUMENTS documents, it also keeps the texts of
the last KEPT_TOKENS tokens. Scores of earlier versions have only these documents, or no single tokens,
and pages say so. The text of documents is untrusted, and pages escape it like any text.

    python -c "from longreach.evaluation.gain_text import level; print(level(2.5), level(-0.2))"

Legend: T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from longreach.evaluation.base import Cell, Result
from longreach.evaluation.blocks import Block, Coloured, Details, Piece, Table
from longreach.evaluation.key_tokens import KEY_GAIN, KEY_NLL, key_positions
from longreach.evaluation.scores import EvalScores, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT_DOCUMENTS = 3
"""Number of documents whose tokens' texts are kept."""
KEPT_TOKENS = 512
"""Number of texts kept at the end of each document: about a page of a book."""
BOUNDS = (0.1, 0.5, 1.0, 2.0)
"""Gains in nats from which the colour is one step stronger."""
EXTREMES = 8
"""Number of tokens listed that gain most, and of those that lose most."""
BEFORE = 40
"""Number of characters shown before a listed token."""


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return the text that each token adds. A character made of several tokens belongs to the last of
    them."""
    texts, done = [], 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        if text.endswith("\ufffd") and end < len(ids):  # an incomplete character, whose other bytes follow
            texts.append("")
            continue
        texts.append(text[done:])
        done = len(text)
    return texts


def token_cases(results: Iterable[tuple[Cell, Result]]) -> list[Row]:
    """Return a case for each window of the test documents: its tokens' NLL in nats by length, and the
    texts of the last tokens if they were kept."""
    cases: dict[tuple[str, int], Row] = {}
    for cell, result in results:
        if cell["split"] != "test" or "left_out" in cell:
            continue
        place = {key: cell[key] for key in ("document", "domain", "end")}
        case = cases.setdefault((cell["document"], cell["end"]), place | {"nll": {}})
        case["nll"][str(cell["length"])] = [round(nll, 3) for nll in result["nll"]]
        if "texts" in result:
            case["texts"] = result["texts"]
    return list(cases.values())


def level(gain: float) -> int:
    """Return the colour step of a gain in nats, from -4 (much worse) to 4 (much better)."""
    steps = sum(abs(gain) >= bound for bound in BOUNDS)
    return steps if gain > 0 else -steps


def coloured_blocks(models: Mapping[str, EvalScores]) -> list[Block]:
    """Return the coloured texts of each model in collapsed blocks, and a sentence on models without
    stored tokens. For several models, show only the first text of each, because each model has a
    page of its own."""
    blocks: list[Block] = []
    missing = []
    for name, scores in models.items():
        shown = [case for case in scores.cases if "texts" in case]
        if not shown:
            missing.append(name)
            continue
        cases = shown if len(models) == 1 else shown[:1]
        inner: list[Block] = []
        for case in cases:
            inner += _blocks_of(case)
        more = len(shown) - len(cases)
        if more:
            inner.append(f"{more} more are on the page of this model's evaluation, gain.html.")
        blocks.append(Details(f"{name}: the text, coloured by each token's gain from context", inner))
    if missing:
        blocks.append(
            f"Single tokens are not stored for {', '.join(missing)}, because the scores are of an earlier version. "
            f"Evaluate gain again to store them."
        )
    return blocks


def _blocks_of(case: Row) -> list[Block]:
    """Return one document's text in colours, and a table of the tokens that gained and lost most."""
    lengths = sorted(case["nll"], key=int)
    short, long = lengths[0], lengths[-1]
    shown = {length: nll[-len(case["texts"]) :] for length, nll in case["nll"].items()}
    case = case | {"nll": shown}
    gains = [a - b for a, b in zip(case["nll"][short], case["nll"][long], strict=True)]
    keys = len(key_positions(case["nll"], int(short), int(long)))
    caption = (
        f"{case['document']}, its last {len(gains):,} tokens: gain with {int(long):,} tokens of context over "
        f"{int(short):,}. Mean: {sum(gains) / len(gains):+.3f} nats per token. Tokens with a gain above "
        f"{KEY_GAIN:g} nats and an NLL below {KEY_NLL:g} with the longer context: {keys}."
    )
    pieces: list[Piece] = []
    for number, (text, gain) in enumerate(zip(case["texts"], gains, strict=True)):
        step = level(gain)
        if not step and pieces and not pieces[-1].level:
            pieces[-1] = Piece(pieces[-1].text + _shown(text), 0, "")
            continue
        says = ""
        if step:
            says = "; ".join(f"{int(length):,}: {case['nll'][length][number]:.2f}" for length in lengths)
        pieces.append(Piece(_shown(text), step, says))
    return [Coloured(caption, pieces, LEGEND), _extremes(case, lengths, gains)]


def _legend() -> list[Piece]:
    """Return a sample of each colour with its bounds in nats."""
    samples = [Piece(f"lost {BOUNDS[-1]:g} nats or more", -len(BOUNDS), "")]
    for low, high in reversed(list(pairwise(BOUNDS))):
        samples.append(Piece(f"{low:g} to {high:g}", -1 - BOUNDS.index(low), ""))
    samples.append(Piece(f"less than {BOUNDS[0]:g} either way", 0, ""))
    for low, high in pairwise(BOUNDS):
        samples.append(Piece(f"{low:g} to {high:g}", 1 + BOUNDS.index(low), ""))
    return [*samples, Piece(f"gained {BOUNDS[-1]:g} nats or more", len(BOUNDS), "")]


LEGEND = _legend()


def _extremes(case: Row, lengths: list[str], gains: list[float]) -> Table:
    """Return a table of the tokens that gained and lost most, with the text before them and their NLL
    by length."""
    order = sorted(range(len(gains)), key=lambda number: -gains[number])
    chosen = [number for number in order[:EXTREMES] if gains[number] > 0]
    chosen += [number for number in order[-EXTREMES:] if gains[number] < 0 and number not in chosen]
    rows = []
    for number in chosen:
        before = "".join(case["texts"][:number])[-BEFORE:]
        name = f"{_in_line(case['texts'][number])}\nafter …{_in_line(before)}"
        nll: list[Any] = [f"{case['nll'][length][number]:.2f}" for length in lengths]
        rows.append([name, *nll, f"{gains[number]:+.2f}"])
    columns = ["token", *(f"{int(length):,}" for length in lengths), "gained"]
    return Table(f"{case['document']}: tokens that gained and lost most (NLL in nats by context length)", columns, rows)


def _in_line(text: str) -> str:
    """Return a text in one line, with visible line breaks and tabs."""
    return _shown(text).replace("\n", "⏎").replace("\t", "⇥").strip(" ") or "(blank)"


def _shown(text: str) -> str:
    """Return a text with its control characters replaced; line breaks and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text)
