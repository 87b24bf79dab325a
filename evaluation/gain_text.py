"""The text of a few documents, coloured by what context gave each token: blue where the longest
context predicts it better than the shortest, red where worse.

`gain` keeps, of the first KEPT_DOCUMENTS test documents, the last KEPT_TOKENS tokens of the
document's last window: what each says, and its NLL under every length. They stand in cases.jsonl,
a document a line; scores of earlier versions have none, and pages say so. A document's text is
other people's: pages escape it like any text.

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
from longreach.evaluation.scores import EvalScores, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT_DOCUMENTS = 3
"""Documents of which single tokens are kept."""
KEPT_TOKENS = 512
"""Tokens of each that are kept, the last ones: about a page of a book."""
BOUNDS = (0.1, 0.5, 1.0, 2.0)
"""Nats from which a colour is one step stronger."""
KEY_GAIN = 2.0
"""Nats that a key token gains at least (LongPPL, arXiv:2410.23771)."""
KEY_NLL = 2.0
"""NLL in the longest context that a key token has at most."""
EXTREMES = 8
"""Tokens that are listed in numbers, of those that gain most and of those that lose most."""
BEFORE = 40
"""Characters before a listed token."""


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return what each token adds to the text; a character of several tokens stands with its last
    one."""
    texts, done = [], 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        if text.endswith("\ufffd") and end < len(ids):  # a character whose other bytes are still to come
            texts.append("")
            continue
        texts.append(text[done:])
        done = len(text)
    return texts


def kept_cases(results: Iterable[tuple[Cell, Result]]) -> list[Row]:
    """Return a case for each document whose tokens were kept: their texts, and their NLL in nats by
    length."""
    results = list(results)
    cases = []
    for cell, result in results:
        if "texts" not in result:
            continue
        nll = {}
        for other, measured in results:
            if (other["document"], other.get("end")) == (cell["document"], cell["end"]):
                nll[str(other["length"])] = [round(value, 3) for value in measured["nll"][-len(result["texts"]) :]]
        place = {key: cell[key] for key in ("document", "domain", "end")}
        cases.append(place | {"texts": result["texts"], "nll": nll})
    return cases


def level(gain: float) -> int:
    """Return the step of colour of a gain in nats, from -4 (hurt) to 4 (helped)."""
    steps = sum(abs(gain) >= bound for bound in BOUNDS)
    return steps if gain > 0 else -steps


def coloured_blocks(models: Mapping[str, EvalScores]) -> list[Block]:
    """Return the coloured texts of each model, folded in; of several models the first text alone,
    as each has a page of its own. Says which models have none stored."""
    blocks: list[Block] = []
    missing = []
    for name, scores in models.items():
        if not scores.cases:
            missing.append(name)
            continue
        cases = scores.cases if len(models) == 1 else scores.cases[:1]
        inner: list[Block] = []
        for case in cases:
            inner += _blocks_of(case)
        more = len(scores.cases) - len(cases)
        if more:
            inner.append(f"{more} more in the page of this model's evaluation, gain.html.")
        blocks.append(Details(f"{name}: the text, coloured by what context gave each token", inner))
    if missing:
        blocks.append(
            f"Single tokens are not stored for {', '.join(missing)}: the scores are of an earlier version "
            f"(measured anew, they have them)."
        )
    return blocks


def _blocks_of(case: Row) -> list[Block]:
    """Return one document's text in colours, and in numbers the tokens that gained and lost most."""
    lengths = sorted(case["nll"], key=int)
    short, long = lengths[0], lengths[-1]
    gains = [a - b for a, b in zip(case["nll"][short], case["nll"][long], strict=True)]
    keys = 0
    for gain, nll in zip(gains, case["nll"][long], strict=True):
        keys += gain > KEY_GAIN and nll < KEY_NLL
    caption = (
        f"{case['document']}, its last {len(gains):,} tokens: {int(long):,} tokens of context against {int(short):,}. "
        f"Mean: {sum(gains) / len(gains):+.3f} nats a token. Key tokens (LongPPL's: a gain above {KEY_GAIN:g} nats, "
        f"and an NLL below {KEY_NLL:g} with it): {keys}."
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
    """Return the tokens that gained and that lost most, with what stands before them and their NLL
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
    return Table(f"{case['document']}: what gained and what lost most (NLL in nats by context)", columns, rows)


def _in_line(text: str) -> str:
    """Return a text in one line, with its blanks to be seen."""
    return _shown(text).replace("\n", "⏎").replace("\t", "⇥").strip(" ") or "(blank)"


def _shown(text: str) -> str:
    """Return a text whose control characters are marks; line ends and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text)
