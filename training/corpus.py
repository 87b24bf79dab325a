"""Write a PackedCorpus folder (`pack_corpus`), or its held-out documents alone (`hold_out`), and
read its rows for training (`PackedRows`).

    rows/         rows of equal length with token ids and positions: memory-mapped Arrow files that
                  `datasets.load_from_disk` opens; with chats, `given` is 1 for tokens that are not predicted
    documents/    the held-out documents, in the same format
    tokenizer/    the tokenizer that made the ids
    packed.json   what the corpus contains and how it was made (PackSummary)

A first pass reads, splits and tokenizes the documents. It writes int32 tokens to one scratch file
and hashed words to another, which training/overlap.py searches for overlaps. The place of each
token in the rows then follows from the document lengths alone (training/packing.py), and a second
pass copies the tokens into shards. Memory use stays at a few megabytes, whatever the size of the
corpus or of one document. Only the search for overlaps needs more: 14 bytes for each byte of
held-out text.

    python -c "import datasets; print(datasets.load_from_disk('corpus/rows'))"

Legend: B rows of a batch, T tokens of a row, D documents.

    pytest tests/test_training_corpus.py tests/test_training_rows.py
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import xxhash
from transformers import PreTrainedTokenizerBase

from longreach.training.chats import Chats, Conversation, check_chats
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe
from longreach.training.documents import (
    BadLine,
    Document,
    HeldOutOnly,
    check_patterns,
    first_chats,
    held_out_digest,
    read_documents,
    source_digest,
    split_of,
)
from longreach.training.exposure import context_counts
from longreach.training.overlap import find_overlaps
from longreach.training.packing import METHODS, Rows, copies
from longreach.training.sink_token import with_sink_token
from longreach.training.summary import (
    BadEntries,
    ChatShare,
    ContextBin,
    HeldOutSummary,
    Overlap,
    PackSummary,
    SourceShare,
)
from longreach.training.tokenise import BATCH_CHARS, Batch, Encoder, Tokens, encode_all, word_hashes

IGNORED = -100  # the label that torch's cross entropy leaves out
SHARD_BYTES = 256 << 20  # size of the rows in one Arrow file
WRITE_BYTES = 8 << 20  # size of the rows in one Arrow record batch, which is filled and written at once
MAX_LISTED = 1000  # packed.json lists at most this many malformed entries, but counts all of them
MAX_OVERLAPS = 20  # packed.json lists at most this many held-out documents with overlaps, largest first
HELD_OUT = ("validation", "test")
SPLITS = ("train", *HELD_OUT)
IDS = pa.list_(pa.int32())
ROW = pa.schema([("input_ids", IDS), ("position_ids", IDS), ("length", pa.int32())])
DOCUMENT = pa.schema([("name", pa.string()), ("domain", pa.string()), ("split", pa.string()), ("input_ids", IDS)])
GIVEN = pa.field("given", pa.list_(pa.int8()))
"""An additional column of rows and documents, present if the corpus contains chats."""


def pack_corpus(
    corpus: CorpusRecipe,
    pack: PackRecipe,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    base_dir: Path | str = ".",
    workers: int = 0,
    progress: Callable[[int], None] = lambda documents: None,
) -> PackSummary:
    """Write the folder and return its summary.

    The number of workers does not change a byte of the output (see encode_all). `progress` is
    called with the number of documents done so far.

    Raises:
        ValueError: the share of malformed entries is above corpus.max_bad_fraction, a split pattern
            matches no document, nothing is left to train on, the tokenizer lacks a special token
            that is needed, or training documents repeat more than corpus.max_overlap of a held-out
            document.
    """
    tokenizer, first_token = _first_token(tokenizer, pack.first_token)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token to end documents with: set its eos_token")
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    lead = int(first_token is not None)
    digest, index = source_digest(corpus, base_dir), CorpusIndex(corpus)
    with _scratch(out) as scratch:
        encoders = Encoders(tokenizer, corpus, pack, first_token)
        encoders.try_first_chats(base_dir)
        _tokenise(read_documents(corpus, base_dir), index, encoders, scratch, workers, progress)
        index.check()
        report = index.report(pack.seq_len - lead)  # before the rows are written, since it may raise
        report["overlaps"] = _overlaps(index, scratch.words, workers)
        segments = METHODS[pack.method](*index.packed(), pack.seq_len, lead)
        rows = Rows(segments, pack.seq_len, first_token, pad, isolated=pack.method == "best_fit")
        contexts_C = _write_rows(out / "rows", rows, scratch, chats=index.chats.count > 0)
        _write_documents(out / "documents", index, scratch)
    tokenizer.save_pretrained(out / "tokenizer")
    row_tokens = int(rows.lengths().sum())
    summary = PackSummary(
        **pack.model_dump(),
        first_token_id=first_token,
        eos_token_id=eos,
        pad_token_id=pad,
        vocab_size=len(tokenizer),
        tokenizer_sha256=hashlib.sha256((out / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest(),
        rows=rows.count,
        tokens=row_tokens,
        efficiency=row_tokens / max(1, rows.count * pack.seq_len),
        documents={split: index.splits.count(split) for split in SPLITS},
        source_digest=digest,
        contexts=_context_bins(contexts_C),
        **report,
    )
    summary.write(out)
    return summary


def hold_out(
    corpus: CorpusRecipe,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    base_dir: Path | str = ".",
    workers: int = 0,
    progress: Callable[[int], None] = lambda documents: None,
) -> HeldOutSummary:
    """Write documents/ and tokenizer/ of a PackedCorpus folder without packing the training
    documents, and return a summary.

    The documents are those that pack_corpus writes, except that a chat keeps the BOS token that its
    template writes, which pack_corpus removes if it adds one itself. `workers` and `progress` are as
    in pack_corpus.

    Raises:
        ValueError: as pack_corpus, as far as it concerns the documents that are read.
    """
    digest, index, wanted = held_out_digest(corpus, base_dir), CorpusIndex(corpus), HeldOutOnly(corpus)
    with _scratch(out) as scratch:
        documents = read_documents(corpus, base_dir, wanted)
        _tokenise(documents, index, Encoders(tokenizer, corpus), scratch, workers, progress)
        index.entries += wanted.entries_left_out
        index.check_malformed()
        check_patterns(list(dict.fromkeys([*wanted.left_out, *index.keys])), corpus)
        _write_documents(out / "documents", index, scratch)
    tokenizer.save_pretrained(out / "tokenizer")
    packages: list[str] = []
    for number in sorted({*index.sources}):
        source = corpus.sources[number]
        if not (source.files or source.repositories):
            packages += source.places()
    summary = HeldOutSummary(
        documents={split: index.splits.count(split) for split in HELD_OUT},
        tokens=sum(index.lengths),
        packages=tuple(packages),
        source_digest=digest,
        bad=BadEntries.model_validate(index.bad_entries()),
    )
    summary.write(out)
    return summary


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Scratch]:
    """Provide temporary files in a folder."""
    with contextlib.ExitStack() as stack:
        yield Scratch(*(stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(3)))


def write_whole_rows(out: Path, corpus: Path | str, *, seq_len: int, rows: int) -> None:
    """Write a PackedCorpus with the same tokens in rows of another length, for cost measurements.

    Each row is a single run that ignores document boundaries. Padding counts as tokens, and a small
    corpus is repeated, so the result is not suitable for training.
    """
    packed = PackedRows(corpus)
    summary = packed.summary
    wanted = min(len(packed), -(-rows * seq_len // summary.seq_len))
    ids = np.resize(packed.batch(range(wanted))["input_ids"].numpy(), (rows, seq_len)).astype(np.int32)
    positions = np.tile(np.arange(seq_len, dtype=np.int32), (rows, 1))
    lengths = pa.array(np.full(rows, seq_len, np.int32))
    out.mkdir(parents=True)
    _write_dataset(out / "rows", ROW, [[pa.record_batch([_lists(ids), _lists(positions), lengths], schema=ROW)]])
    shutil.copytree(Path(corpus) / "tokenizer", out / "tokenizer")
    changed = {"seq_len": seq_len, "method": "concat", "rows": rows, "tokens": rows * seq_len, "efficiency": 1.0}
    summary.model_copy(update=changed).write(out)


def _context_bins(counts_C: np.ndarray) -> tuple[ContextBin, ...]:
    """Count the targets by effective context, in bins that double in size."""
    bins = []
    for n in range((len(counts_C) - 1).bit_length() + 1):
        low, high = (1 << n) // 2 + 1, 1 << n
        bins.append(ContextBin(up_to=high, targets=int(counts_C[low : high + 1].sum())))
    return tuple(bins)


def _first_token(tokenizer: PreTrainedTokenizerBase, kind: str) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Return the tokenizer, with a sink token if needed, and the id of the first token."""
    if kind == "sink":
        return with_sink_token(tokenizer)
    if kind == "none":
        return tokenizer, None
    if tokenizer.bos_token_id is None:
        raise ValueError("pack.first_token is 'bos', but the tokenizer has no BOS token: use 'none' or 'sink'")
    return tokenizer, tokenizer.bos_token_id


class CorpusIndex:
    """What the first pass learns about each document, in the order of the sources."""

    def __init__(self, corpus: CorpusRecipe) -> None:
        self.corpus = corpus
        self.names: list[str] = []
        self.keys: list[str] = []
        """What split patterns match: a document's repository if it has one, else its name."""
        self.domains: list[str] = []
        self.splits: list[str] = []
        self.sources: list[int] = []
        """Index into corpus.sources."""
        self.lengths: list[int] = []
        """Number of tokens of the text, without first token and EOS."""
        self.words: list[int] = []
        """Number of words of the text (training/tokenise.py)."""
        self.closed: list[bool] = []
        """Whether an EOS follows the document. False for a chat, whose template ends it."""
        self.chats = ChatShare()
        self.bad: list[BadLine] = []
        self.bad_count = 0
        self.entries = 0
        """Number of entries: documents, files of repositories, and malformed entries."""

    @property
    def compared(self) -> bool:
        """Whether to search for overlaps between training and held-out documents."""
        return self.corpus.max_overlap is not None and bool(self.corpus.validation or self.corpus.test)

    def add(self, item: Document | BadLine) -> None:
        """Add the next document or malformed entry. A document's tokens are counted later."""
        if isinstance(item, BadLine):
            self.bad_count += 1
            self.entries += 1
            if len(self.bad) < MAX_LISTED:
                self.bad.append(item)
            return
        self.entries += item.entries
        self.names.append(item.name)
        self.keys.append(item.key)
        self.domains.append(item.domain)
        self.splits.append(split_of(item.key, self.corpus))
        self.sources.append(item.source)
        self.lengths.append(0)
        self.words.append(0)
        self.closed.append(not isinstance(item.text, Conversation))

    def add_chat(self, tokens: Tokens, cut: int) -> None:
        """Count the last document, which is a chat, in the chat statistics."""
        assert tokens.given is not None
        facts = self.chats
        self.chats = ChatShare(
            count=facts.count + 1,
            tokens=facts.tokens + len(tokens.ids),
            predicted=facts.predicted + int((~tokens.given).sum()),
            cut=facts.cut + (cut > 0),
            cut_tokens=facts.cut_tokens + cut,
            left_out=facts.left_out + (len(tokens.ids) == 0),
        )

    def check(self) -> None:
        """Raise ValueError for too many malformed entries, no document, or an unmatched pattern."""
        self.check_malformed()
        if not self.names:
            raise ValueError(
                f"corpus.sources contain no document and {self.bad_count} malformed entries: check the files"
            )
        check_patterns(list(dict.fromkeys(self.keys)), self.corpus)
        if "train" not in self.splits:
            raise ValueError(
                f"corpus.validation and corpus.test match all {len(self.names)} documents, so none is left to train "
                "on: narrow their patterns, or add a source"
            )

    def check_malformed(self) -> None:
        """Raise ValueError if the share of malformed entries is above the recipe's limit."""
        entries, limit = self.entries, self.corpus.max_bad_fraction
        if self.bad_count > limit * entries:
            first = self.bad[0]
            raise ValueError(
                f"{self.bad_count} of {entries} documents are malformed: {self.bad_count / entries:.2%}, more than "
                f"corpus.max_bad_fraction {limit:.2%}; the first is {first.file}:{first.line}: {first.reason}. "
                f"Fix them or raise the limit"
            )

    def extents(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each document's start in the scratch file and its length with EOS, [D] each."""
        lengths = np.array(self.lengths, np.int64)
        starts = 1 + np.cumsum(lengths + 1) - (lengths + 1)
        return starts, lengths + np.array(self.closed)

    @functools.cached_property
    def copies(self) -> np.ndarray:
        """How often each document occurs in the rows, [D]. 0 if it is held out or left out."""
        copies_D = np.zeros(len(self.lengths), np.int64)
        for number, source in enumerate(self.corpus.sources):
            kept, _ = self._training(number)
            rng = np.random.default_rng([self.corpus.seed, number])
            copies_D[kept] = copies(np.array(self.lengths)[kept], source.weight, rng)
        return copies_D

    def _training(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of a source's training documents: those kept, and those left out."""
        source, length_D = self.corpus.sources[number], np.array(self.lengths)
        train_D = np.array([split == "train" for split in self.splits]) & (np.array(self.sources) == number)
        fits_D = length_D >= max(1, source.min_tokens)  # a chat is empty if no answer fits in a row
        if source.max_tokens is not None:
            fits_D &= length_D <= source.max_tokens
        return np.flatnonzero(train_D & fits_D), np.flatnonzero(train_D & ~fits_D)

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """Return starts and lengths, as `extents` does, of all documents in the rows, with repeats.

        Repeats come after all documents have occurred once, so that no text follows itself.
        """
        starts_D, lengths_D = self.extents()
        rounds = [np.flatnonzero(self.copies > n) for n in range(self.copies.max(initial=0))]
        chosen = np.concatenate([np.empty(0, np.int64), *rounds])
        return starts_D[chosen], lengths_D[chosen]

    def _shares(self) -> list[SourceShare]:
        """Return what each source contributed.

        Raises:
            ValueError: a source has training documents, but contributes none of them.
        """
        shares = []
        for number, source in enumerate(self.corpus.sources):
            kept, left_out = self._training(number)
            length_D = np.array(self.lengths)
            share = SourceShare(
                source=", ".join(source.places()),
                weight=source.weight,
                documents=len(kept) + len(left_out),
                tokens=int(length_D[kept].sum()),
                left_out=len(left_out),
                packed_documents=int(self.copies[kept].sum()),
                packed_tokens=int((self.copies * length_D)[kept].sum()),
            )
            if share.documents and not share.packed_documents:
                lengths = length_D[np.concatenate([kept, left_out])]
                raise ValueError(
                    f"corpus.sources.{number} ({share.source}) contributes nothing to the rows: it has "
                    f"{share.documents} training documents of {lengths.min()} to {lengths.max()} tokens, of which "
                    f"min_tokens {source.min_tokens} and max_tokens {source.max_tokens} leave {len(kept)}, and weight "
                    f"{source.weight:g} draws none of these. Change these fields or remove the source"
                )
            shares.append(share)
        return shares

    def report(self, capacity: int) -> dict[str, Any]:
        """Return PackSummary's fields about documents, sources and malformed entries.

        capacity: the number of tokens that a row has for a document.
        """
        ends = 1 << np.arange(min(self.lengths).bit_length(), max(self.lengths).bit_length() + 1)
        histogram: list[dict[str, int]] = [{"up_to": end} for end in ends.tolist()]
        tokens = {}
        for split in SPLITS:
            lengths = np.array([n for n, s in zip(self.lengths, self.splits, strict=True) if s == split], np.int64)
            tokens[split] = int(lengths.sum())
            place = np.searchsorted(ends, lengths)
            for one, count in zip(histogram, np.bincount(place, minlength=len(ends)), strict=True):
                one[split] = int(count)
        return {
            "document_tokens": tokens,
            "longer_than_a_row": int(np.sum(self.extents()[1][self.copies > 0] > capacity)),
            "truncated_tokens": self.chats.cut_tokens,  # texts lose none: they continue in another row
            "chats": self.chats if self.chats.count else None,
            "length_histogram": histogram,
            "sources": self._shares(),
            "bad": self.bad_entries(),
        }

    def bad_entries(self) -> dict[str, Any]:
        """Return BadEntries' fields for the malformed entries so far."""
        return {
            "count": self.bad_count,
            "fraction": self.bad_count / max(1, self.entries),
            "listed": [asdict(one) for one in self.bad],
        }


class Scratch(NamedTuple):
    """Temporary files that hold all documents until they are packed."""

    tokens: IO[bytes]  # EOS, document, EOS, document, ... EOS, as int32
    words: IO[bytes]  # word_hashes of all documents, as uint32
    given: IO[bytes]
    """One byte for each token, 1 if it is not predicted. Empty if the corpus contains no chats."""


class Encoders:
    """Convert texts and chats to tokens."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        corpus: CorpusRecipe,
        pack: PackRecipe | None = None,
        first_token: int | None = None,
    ) -> None:
        """Take a corpus' choices, and how it is packed; without `pack`, only held-out documents can
        be converted."""
        self.tokenizer, self.corpus, self.pack, self.first_token = tokenizer, corpus, pack, first_token
        kinds = {source.special_tokens for source in corpus.sources}
        self.texts = {kind: Encoder.of(tokenizer, parse=kind == "parse") for kind in kinds}

    @functools.cached_property
    def chats(self) -> Chats:
        """The encoder for chats; ValueError if this recipe or base cannot pack chats."""
        check_chats(bool(self.tokenizer.chat_template), self.pack.method if self.pack else None)
        return Chats(self.tokenizer, self.first_token)

    def chat(self, document: Document) -> tuple[Tokens, int]:
        """Return a chat's tokens and how many were cut. Only a training chat is cut, to fit a row.

        Raises:
            ValueError: as in Chats.encode.
        """
        assert isinstance(document.text, Conversation)
        most = None
        if self.pack and split_of(document.key, self.corpus) == "train":
            most = self.pack.seq_len - (self.first_token is not None)
        parse = self.corpus.sources[document.source].special_tokens == "parse"
        ids, given, cut = self.chats.encode(document.text, most, parse)
        words = word_hashes("".join(document.blocks()))
        return Tokens(ids, np.array([len(ids)]), words, np.array([len(words)]), given), cut

    def try_first_chats(self, base_dir: Path | str) -> None:
        """Raise ValueError if a source's first valid record is a chat that cannot be encoded."""
        for document in first_chats(self.corpus, base_dir, datasets=True):
            try:
                self.chat(document)
            except ValueError as error:
                raise ValueError(f"{document.file}:{document.line}: {error}") from error


def _tokenise(
    items: Iterable[Document | BadLine],
    index: CorpusIndex,
    encoders: Encoders,
    scratch: Scratch,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Write tokens and word hashes to the scratch files, and their numbers to the index."""
    owners: deque[np.ndarray] = deque()  # for each batch in progress, the document index of each of its texts
    last, written = -1, 0
    eos: int = encoders.tokenizer.eos_token_id or 0  # without an EOS, any token can stand between held-out documents
    batches = _batches(_pieces(items, index, encoders), owners)
    for ids, lengths, hashes, counts, given in encode_all(batches, workers):
        owner = owners.popleft()
        for document, tokens, count in zip(owner.tolist(), lengths.tolist(), counts.tolist(), strict=True):
            index.lengths[document] += tokens
            index.words[document] += count
        if index.compared:
            scratch.words.write(hashes.data)
        begins = np.diff(owner, prepend=last) > 0
        scratch.tokens.write(np.insert(ids, (np.cumsum(lengths) - lengths)[begins], eos).data)
        if given is not None:
            scratch.given.seek(written + 1)  # gaps in the file read as 0
            scratch.given.write(given.astype(np.int8).data)
        written += len(ids) + int(begins.sum())
        last = int(owner[-1])
        progress(last)
    scratch.tokens.write(np.array([eos], np.int32).data)
    if index.chats.count:
        scratch.given.truncate(written + 1)
    for file in scratch:
        file.flush()
    progress(last + 1)


Piece = tuple[int, Encoder | None, str | Tokens]
"""A part of a text, or a whole chat: the index of its document, its encoder, and the content."""


def _pieces(items: Iterable[Document | BadLine], index: CorpusIndex, encoders: Encoders) -> Iterator[Piece]:
    """Yield all documents in parts.

    Raises:
        ValueError: a text cannot be cut; the message gives its file and line.
    """
    for item in items:
        if isinstance(item, Document) and isinstance(item.text, Conversation):
            _ = encoders.chats  # its errors concern all chats
            try:
                tokens, cut = encoders.chat(item)
            except ValueError as error:
                index.add(BadLine(item.file, item.line, str(error)))
                continue
            index.add(item)
            index.add_chat(tokens, cut)
            yield len(index.names) - 1, None, tokens
            continue
        index.add(item)
        if isinstance(item, BadLine):
            continue
        source = index.corpus.sources[item.source]
        encoder = encoders.texts[source.special_tokens]
        try:
            for part in encoder.parts(item.blocks(), most=source.max_piece_chars):
                yield len(index.names) - 1, encoder, part
        except ValueError as error:
            raise ValueError(f"{item.file}:{item.line}: {error}") from None


def _batches(pieces: Iterable[Piece], owners: deque[np.ndarray]) -> Iterator[Batch]:
    """Yield batches of about BATCH_CHARS; append the document index of each text to `owners`."""
    texts: list[str] = []
    owner: list[int] = []
    chars, encoder = 0, None
    for document, by, piece in pieces:
        if encoder and texts and (by is not encoder or chars >= BATCH_CHARS):
            owners.append(np.array(owner))
            yield encoder, texts
            texts, owner, chars = [], [], 0
        if isinstance(piece, Tokens):
            owners.append(np.array([document]))
            yield piece
            continue
        encoder = by
        texts.append(piece)
        owner.append(document)
        chars += len(piece)
    if encoder and texts:
        owners.append(np.array(owner))
        yield encoder, texts


def _overlaps(index: CorpusIndex, words: IO[bytes], workers: int) -> tuple[Overlap, ...] | None:
    """Return the largest overlaps, or None if the recipe does not search for them.

    Raises:
        ValueError: an overlap is above corpus.max_overlap.
    """
    if not index.compared:
        return None
    counts = np.array(index.words, np.int64)
    ends = np.cumsum(counts)

    def words_of(document: int) -> np.ndarray:
        if not counts[document]:
            return np.empty(0, np.uint32)
        first = 4 * int(ends[document] - counts[document])  # map this document only
        return np.memmap(words, np.uint32, "r", offset=first, shape=(int(counts[document]),))

    held_out = [n for n, split in enumerate(index.splits) if split != "train"]
    found = find_overlaps(words_of, held_out, np.flatnonzero(index.copies).tolist(), workers)
    limit = index.corpus.max_overlap
    assert limit is not None
    overlaps, over = [], 0
    for one in found:
        overlap = Overlap(
            document=index.names[one.document],
            split=index.splits[one.document],
            share=one.share,
            nearest=index.names[one.nearest],
            nearest_share=one.nearest_share,
        )
        overlaps.append(overlap)
        over += overlap.share > limit
    if over:
        worst = overlaps[0]
        more = f" {over} held-out documents are above the limit." if over > 1 else ""
        raise ValueError(
            f"corpus.max_overlap is {limit:.1%}, but {worst.share:.1%} of the {worst.split} document "
            f"{worst.document!r} also occur in training documents, {worst.nearest_share:.1%} in {worst.nearest!r} "
            f"alone.{more} Add {index.keys[found[0].nearest]!r} to corpus.{worst.split}, remove it from the sources, "
            f"or raise max_overlap (1 only reports overlaps)"
        )
    return tuple(overlaps[:MAX_OVERLAPS])


def _mapped(file: IO[bytes], dtype: type = np.int32) -> np.ndarray:
    """Map a scratch file.

    Callers map it again for each batch: pages that were read count as memory of this process for
    as long as the mapping exists.
    """
    return np.memmap(file, dtype, "r")


def _write_rows(folder: Path, rows: Rows, scratch: Scratch, chats: bool) -> np.ndarray:
    """Write the rows; return how many targets see each number of tokens of their run, [C] int64."""
    row_bytes = 8 * rows.seq_len
    in_shard, in_batch = max(1, SHARD_BYTES // row_bytes), max(1, WRITE_BYTES // row_bytes)
    schema, contexts_C = ROW, np.zeros(rows.seq_len, np.int64)
    marks = replace(rows, first_token=None if rows.first_token is None else 1, pad_token=1)
    if chats:
        schema = ROW.append(GIVEN)

    def batches(start: int, stop: int) -> Iterator[pa.RecordBatch]:
        for low in range(start, stop, in_batch):
            high = min(low + in_batch, stop)
            ids, positions, lengths = rows.fill(low, high, _mapped(scratch.tokens))
            columns = [_lists(ids), _lists(positions), pa.array(lengths)]
            if chats:
                given, _, _ = marks.fill(low, high, _mapped(scratch.given, np.int8))
                contexts_C[:] += np.bincount(positions[(given == 0) & (positions > 0)], minlength=rows.seq_len)
                columns.append(_lists(given.astype(np.int8)))
            yield pa.record_batch(columns, schema=schema)

    shards = [batches(start, min(start + in_shard, rows.count)) for start in range(0, rows.count, in_shard)]
    _write_dataset(folder, schema, shards)
    if chats:
        return contexts_C
    return context_counts(rows.run_lengths(), rows.seq_len)


def _write_documents(folder: Path, index: CorpusIndex, scratch: Scratch) -> None:
    """Write the held-out documents: the tokens of their text, without first token and EOS."""
    schema = DOCUMENT
    if index.chats.count:
        schema = DOCUMENT.append(GIVEN)

    def batches() -> Iterator[pa.RecordBatch]:
        starts, _ = index.extents()
        for n, split in enumerate(index.splits):
            if split == "train":
                continue
            columns = [pa.array([label]) for label in (index.names[n], index.domains[n], split)]
            tokens = slice(starts[n], starts[n] + index.lengths[n])
            columns.append(_lists(_mapped(scratch.tokens)[tokens][None]))
            if index.chats.count:
                columns.append(_lists(_mapped(scratch.given, np.int8)[tokens][None]))
            yield pa.record_batch(columns, schema=schema)

    _write_dataset(folder, schema, [batches()])


def _lists(values: np.ndarray) -> pa.ListArray:
    """Return an array of shape [lists, values in each] as an Arrow list column, without a copy."""
    edges = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(edges), pa.array(values.reshape(-1)))


def _write_dataset(folder: Path, schema: pa.Schema, shards: Sequence[Iterable[pa.RecordBatch]]) -> None:
    """Write the files that `Dataset.save_to_disk` would write, without its copy of all data.

    The keys of state.json are private to `datasets`, but it does not load a folder without them.
    """
    import datasets

    folder.mkdir()
    files, digest = [], xxhash.xxh3_64()
    for n, batches in enumerate(shards):
        files.append(f"data-{n:05d}-of-{len(shards):05d}.arrow")
        with pa.OSFile(str(folder / files[-1]), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                digest.update(batch["input_ids"].values.buffers()[1])
    datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(schema)).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": file} for file in files], "_fingerprint": digest.hexdigest(),
        "_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False,
        "_split": None,
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


class PackedRows:
    """The rows of a PackedCorpus folder, memory-mapped, so that opening takes milliseconds."""

    def __init__(self, corpus_dir: Path | str) -> None:
        folder = Path(corpus_dir)
        self.summary = PackSummary.read(folder)
        state = json.loads((folder / "rows" / "state.json").read_text(encoding="utf-8"))
        blocks: list[pa.RecordBatch] = []
        for entry in state["_data_files"]:
            file = pa.memory_map(str(folder / "rows" / entry["filename"]))
            blocks += pa.ipc.open_stream(file).read_all().to_batches()
        self._ends = np.cumsum([len(block) for block in blocks])
        names = blocks[0].schema.names if blocks else ROW.names
        self._columns = {}
        for name in names:
            self._columns[name] = [_view(block[name]) for block in blocks]
        if len(self) != self.summary.rows:
            raise ValueError(f"{folder}: packed.json counts {self.summary.rows} rows, but rows/ contains {len(self)}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _read(self, column: str, row_ids: np.ndarray) -> torch.Tensor:
        """Return a column's values in the given rows, [B, ...] int64."""
        block_B = np.searchsorted(self._ends, row_ids, side="right")
        rows = [self._columns[column][b][row - self._ends[b]] for b, row in zip(block_B, row_ids, strict=True)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def context_counts(self) -> np.ndarray:
        """Return how many targets see each number of tokens of their run, [T] int64."""
        counts_C = np.zeros(self.summary.seq_len, np.int64)
        rows = max(1, WRITE_BYTES // (8 * self.summary.seq_len))
        for at in range(0, len(self), rows):
            batch = self.batch(range(at, min(at + rows, len(self))))
            contexts = batch["position_ids"][batch["labels"] != IGNORED]  # positions restart with each run
            counts_C += np.bincount(contexts.numpy(), minlength=len(counts_C))
        return counts_C

    def mean_document(self, rows: int = 256) -> float:
        """Return the mean over tokens of their document's length: 2 x mean position + 1."""
        return 2 * float(self._read("position_ids", np.arange(min(rows, len(self)))).double().mean()) + 1

    def batch(self, row_ids: Sequence[int] | np.ndarray, drop_first: bool = False) -> dict[str, torch.Tensor]:
        """Return input_ids, position_ids and labels of the given rows, [B, T] int64 each.

        labels are the input_ids, not shifted (the loss shifts them). They are -100 for the first
        token of a row or of an isolated document, which has nothing to predict it from, for
        padding, and for the tokens of a chat that the assistant did not say.

        drop_first removes the sink or BOS token that opens each row or document and pads the end of
        the row instead, so that a model without this token reads the same text.

        Raises:
            ValueError: drop_first, but the rows have no first token.
        """
        row_ids = np.asarray(row_ids)
        if len(row_ids) and not 0 <= row_ids.min() <= row_ids.max() < len(self):
            raise IndexError(f"rows {row_ids.min()} to {row_ids.max()} requested, but there are {len(self)}")
        ids_BT, positions_BT = self._read("input_ids", row_ids), self._read("position_ids", row_ids)
        length_B1 = self._read("length", row_ids)[:, None]
        given_BT = torch.zeros_like(ids_BT)
        if GIVEN.name in self._columns:
            given_BT = self._read(GIVEN.name, row_ids)
        if drop_first:
            ids_BT, positions_BT, length_B1, given_BT = self._without_first(ids_BT, positions_BT, length_B1, given_BT)
        nothing_BT = (positions_BT == 0) | (torch.arange(ids_BT.shape[1]) >= length_B1) | (given_BT == 1)
        return {
            "input_ids": ids_BT.contiguous(),
            "position_ids": positions_BT.contiguous(),
            "labels": ids_BT.masked_fill(nothing_BT, IGNORED),
        }

    def _without_first(
        self, ids_BT: torch.Tensor, positions_BT: torch.Tensor, length_B1: torch.Tensor, given_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the rows without their sink or BOS tokens; the other tokens move left."""
        if (first := self.summary.first_token_id) is None:
            raise ValueError("drop_first needs rows with a first token: pack them with first_token 'sink' or 'bos'")
        column_T = torch.arange(ids_BT.shape[1])
        first_BT = (ids_BT == first) & (positions_BT == 0) & (column_T < length_B1)
        kept_BT = torch.argsort(first_BT, dim=1, stable=True)
        length_B1 = length_B1 - first_BT.sum(1, keepdim=True)
        padding_BT = column_T >= length_B1
        ids_BT = ids_BT.gather(1, kept_BT).masked_fill(padding_BT, self.summary.pad_token_id)
        positions_BT = torch.where(padding_BT, column_T - length_B1, positions_BT.gather(1, kept_BT) - 1)
        return ids_BT, positions_BT, length_B1, given_BT.gather(1, kept_BT)


def _view(column: pa.Array) -> np.ndarray:
    """Return an Arrow column as NumPy without a copy; lists of equal length as [rows, length]."""
    if pa.types.is_list(column.type):
        return column.values.to_numpy().reshape(len(column), -1)
    return column.to_numpy()
