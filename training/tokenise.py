"""Tokenise text in parallel and in bounded memory, with the same ids as encoding it as a whole.

A text is cut only where its tokenizer is known to begin a new pre-token, whatever surrounds the cut
(`exact_cut` has the proofs), and each cut is verified on the characters around it. Cutting also
saves time: pieces of 1 KB stay in the CPU cache and take half the CPU time of whole books.
"""

from __future__ import annotations

import functools
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECE_CHARS = 1024
"""Characters per call of the tokenizer. On books, 512 cost the same, 4,096 a quarter more,
and 65,536 twice as much."""
PART_CHARS = 1 << 16  # characters sent to a worker as one text, plus those up to the next cut
BATCH_CHARS = 1 << 20  # characters in one task
CHECKED_CHARS = 16  # characters on each side of a cut that the assertion encodes

GPT2_CUT = re.compile(r"(?<=\S)(?=[ \n])")
LLAMA3_CUT = re.compile(r"(?<=\S)(?= )|(?<=\n)(?=\S)")
LLAMA3_SPLITS = tuple(
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("{1,3}", "")  # Llama 3, Qwen 2
)

NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # each Japanese or Chinese character counts as a word
WORD = re.compile(f"[{NO_SPACES}]|[^\\W{NO_SPACES}]+")


def exact_cut(tokenizer: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern that matches where a text can be cut without changing a token.

    None means that no such place is known. The conditions are: BPE, which encodes each pre-token
    alone; no normalizer or NFC, which joins nothing across a space or line end; and a pre-tokenizer
    whose regex scans from left to right without lookbehind, so that the text after a pre-token is
    split as if it were alone. It remains to show that a pre-token ends at the cut, and that the
    pre-tokens before it do not change, although the regex now reaches the end of the text there.

    - GPT-2: no alternative contains a non-space followed by white space. Runs of white space, the
      only alternative with a lookahead, stay with the text that follows. Splitting off digits first
      (SmolLM2) depends only on the character class.
    - Llama 3, Qwen 2: the same holds before a space. After a line end, no alternative continues to
      a non-space, and `\\s*[\\r\\n]+`, which is tried before the alternative with a lookahead,
      takes the whole run of white space.

    Llama 2's tokenizer treats a text as one word with marked spaces, so texts are encoded whole.
    """
    spec = json.loads(tokenizer.to_str())
    model, normalizer, added = spec["model"], spec["normalizer"], spec["added_tokens"]
    cut = _cut_of_pre_tokenizer(spec["pre_tokenizer"] or {"type": None})
    affixes = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if cut is None or model["type"] != "BPE" or any(model.get(key) for key in affixes):
        return None
    if normalizer is not None and normalizer["type"] != "NFC":
        return None
    if any(token["lstrip"] or token["rstrip"] or cut.search(token["content"]) for token in added):
        return None  # it could span a cut, or strip white space across one
    return cut


def _cut_of_pre_tokenizer(spec: dict[str, Any]) -> re.Pattern[str] | None:
    *first, last = spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        return GPT2_CUT if all(step["type"] == "Digits" for step in first) else None
    if len(first) == 1 and first[0]["type"] == "Split":
        (split,) = first
        isolated = split["behavior"] == "Isolated" and not split["invert"]
        return LLAMA3_CUT if isolated and split["pattern"].get("Regex") in LLAMA3_SPLITS else None
    return None


class Tokens(NamedTuple):
    """The joined tokens of consecutive texts, or those of one chat."""

    ids: np.ndarray  # [tokens] int32, since there are vocabularies above 65,535
    lengths: np.ndarray  # [texts] int64; they sum to the number of ids
    words: np.ndarray
    """The joined word_hashes of the texts. No cut is inside a word."""
    word_counts: np.ndarray  # [texts] int64; they sum to the number of words
    given: np.ndarray | None = None
    """For a chat, which tokens are not predicted, [tokens] bool."""


class Encoder:
    """A tokenizer and the pattern where its texts can be cut.

    Special tokens in a text are encoded as ordinary text, unless `parse` is true.
    """

    def __init__(self, tokenizer_json: str, parse: bool = False) -> None:
        self.json, self.parse = tokenizer_json, parse
        self.tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = not parse
        self.cut = exact_cut(self.tokenizer)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, parse: bool = False) -> Encoder:
        """Return the encoder of a transformers tokenizer; ValueError unless it is a fast one."""
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer: save it as tokenizer.json first")
        return cls(tokenizer.backend_tokenizer.to_str(), parse)

    def parts(self, blocks: Iterable[str], chars: int = PART_CHARS, most: int | None = None) -> Iterator[str]:
        """Yield a text, given in blocks, in parts of at least `chars` that end at an allowed cut.

        Raises:
            ValueError: more than `most` characters contain no allowed cut.
        """
        rest = ""
        for block in blocks:
            start, seen, rest = 0, max(0, len(rest) - 1), rest + block
            while self.cut and (match := self.cut.search(rest, max(seen, start + chars))):
                self._assert_exact(rest, match.start())
                yield rest[start : match.start()]
                start = match.start()
            rest = rest[start:]
            if most is not None and len(rest) > most + chars:
                raise ValueError(
                    f"more than max_piece_chars {most:,} characters would have to be tokenized at once, because this "
                    f"tokenizer allows no cut in them: split the text, leave it out, or raise the limit"
                )
        if rest:
            yield rest

    def encode(self, texts: list[str]) -> Tokens:
        """Return the tokens of the texts, without adding BOS, EOS or other special tokens."""
        ids, lengths = [np.empty(0, np.int32)], np.zeros(len(texts), np.int64)
        words, word_counts = [np.empty(0, np.uint32)], np.zeros(len(texts), np.int64)
        for n, text in enumerate(texts):
            for piece in self.parts([text], PIECE_CHARS):
                ids.append(np.array(self._ids(piece), np.int32))
                lengths[n] += len(ids[-1])
                words.append(word_hashes(piece))
                word_counts[n] += len(words[-1])
        return Tokens(np.concatenate(ids), lengths, np.concatenate(words), word_counts)

    def _assert_exact(self, text: str, at: int) -> None:
        before, after = text[max(0, at - CHECKED_CHARS) : at], text[at : at + CHECKED_CHARS]
        same = self._ids(before + after) == self._ids(before) + self._ids(after)
        assert same, f"cutting between {before!r} and {after!r} changes tokens"

    def _ids(self, text: str) -> list[int]:
        # only the batch call can leave out the offsets, which cost as much time as the ids
        return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def word_hashes(text: str) -> np.ndarray:
    """Return a case-insensitive hash of each word of a text, [words] uint32.

    It takes a tenth of the time of `encode`.
    """
    words = " ".join(WORD.findall(text.lower())).encode().split()
    return np.fromiter(map(zlib.crc32, words), np.uint32, len(words))


Batch = tuple[Encoder, list[str]] | Tokens
"""Texts with their encoder, or tokens that are already encoded, in their place in the order."""


def encode_all(batches: Iterable[Batch], workers: int = 0) -> Iterator[Tokens]:
    """Yield the tokens of each batch, in order; only a few batches are in memory at a time.

    workers: number of concurrent Ray tasks with one CPU each, on any machine of the cluster; 0 uses
        threads of this process (the tokenizer releases the GIL).
    """
    if workers:
        import ray

        task, specs = ray.remote(num_cpus=1)(_encode_remotely), {}

        def submit(batch: Batch) -> Any:
            if isinstance(batch, Tokens):
                return batch
            encoder, texts = batch
            if encoder.json not in specs:
                specs[encoder.json] = ray.put(encoder.json)
            return task.remote(specs[encoder.json], encoder.parse, texts)

        yield from in_order(
            submit, lambda sent: sent if isinstance(sent, Tokens) else ray.get(sent), batches, 2 * workers
        )
        return
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:

        def encode(batch: Batch) -> Tokens:
            if isinstance(batch, Tokens):
                return batch
            encoder, texts = batch
            return encoder.encode(texts)

        yield from in_order(lambda batch: pool.submit(encode, batch), Future.result, batches, 2 * threads)


def in_order(submit: Callable, result: Callable, items: Iterable, ahead: int) -> Iterator:
    """Yield result(submit(item)) for each item, in order, with up to `ahead` items in progress."""
    pending: deque = deque()
    for item in items:
        pending.append(submit(item))
        if len(pending) > ahead:
            yield result(pending.popleft())
    while pending:
        yield result(pending.popleft())


def _encode_remotely(tokenizer_json: str, parse: bool, texts: list[str]) -> Tokens:
    return _encoder(tokenizer_json, parse).encode(texts)


@functools.lru_cache(maxsize=2)
def _encoder(tokenizer_json: str, parse: bool) -> Encoder:
    # cached in each process, since parsing a tokenizer takes as long as encoding 200 KB
    return Encoder(tokenizer_json, parse)
