"""Find contamination: held-out documents that training documents nearly repeat. It inflates scores.

The search compares runs of N words, ignoring case, punctuation and line endings. A held-out
document is cut into passages of about PASSAGE runs, and every training document is read in windows
of the same size that overlap by half. MinHash (Broder 1997) and banded LSH, both from datasketch,
find the passages that resemble a window. For these, the shared runs are counted exactly. This finds
a long document that contains a short one, and a document that repeats parts of another.

On books, the search takes 0.28 CPU seconds per MB of training text and 14 MB of memory per MB of
held-out text; on code it takes less. Shares are lower bounds: the search finds 0.99 of a copy, 0.75
of 0.76 with one word in 20 changed, and 0.52 of 0.59 with one word in ten changed. Hashes and
permutations are fixed, so the same texts give the same shares everywhere.

    from longreach.training.overlap import find_overlaps
    documents = [word_hashes(text) for text in texts]  # training/tokenise.py
    find_overlaps(documents.__getitem__, held_out=[0], training=[1, 2])

    pytest tests/test_training_overlap.py
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from longreach.training.tokenise import in_order

if TYPE_CHECKING:
    from datasketch import MinHash

N = 5
"""Words in a run, as in RefinedWeb (arXiv:2306.01116). With 8, one changed word would hide eight
runs."""
PASSAGE = 100  # runs in a passage and in a window: smaller values find shorter quotations, but cost more
STEP = PASSAGE // 2  # runs from one window to the next: some window contains at least 3/4 of a copied passage
MIN_WORDS = 50  # shorter held-out documents are not compared: a repeated greeting is not contamination
PERMUTATIONS, BANDS = 40, 20
"""A passage and a window with Jaccard similarity j (0.6 or more for a copy) are matched with
probability 1 - (1 - j^2)^20: 0.9999 for j = 0.6, 0.90 for 0.33, 0.18 for 0.1."""
BATCH_WORDS = 5000 * STEP  # words in a task, 1.5 MB of text; a multiple of STEP, so that cuts move no window

Repeated = dict[int, np.ndarray]
"""A mask for each passage number: which of its runs also occur elsewhere."""


class Overlap(NamedTuple):
    """A held-out document that training documents repeat, and the one that repeats most of it."""

    document: int
    share: float  # share of its runs that occur in any training document
    nearest: int  # the training document that contains most of them
    nearest_share: float


def find_overlaps(
    words: Callable[[int], np.ndarray], held_out: Iterable[int], training: Iterable[int], workers: int = 0
) -> list[Overlap]:
    """Return the held-out documents that training documents repeat in part, largest share first.

    words: returns a document's word_hashes by its number; the array may be a view of a file.
    workers: number of concurrent Ray tasks with one CPU each; 0 uses this process only. It does not
        change the result.
    """
    training = list(training)
    if not training:
        return []
    index = HeldOut((document, words(document)) for document in held_out)
    everywhere: Repeated = {}
    nearest: dict[int, tuple[int, int]] = {}  # by held-out document: (runs, training document)
    results = _search(_batches(words, training), index, workers) if index.sizes else iter(())
    for document, pieces in groupby(results, key=itemgetter(0)):
        here: Repeated = {}
        for _, found in pieces:
            _add(here, found)
        for held, runs in index.runs(here).items():
            if runs > nearest.get(held, (0, 0))[0]:
                nearest[held] = (runs, document)
        _add(everywhere, here)
    overlaps = []
    for held, runs in index.runs(everywhere).items():
        size, (most, document) = index.sizes[held], nearest[held]
        overlaps.append(Overlap(held, runs / size, document, most / size))
    return sorted(overlaps, key=lambda one: (-one.share, one.document))


class HeldOut:
    """An index of the passages of held-out documents, to find those that a text repeats."""

    def __init__(self, documents: Iterable[tuple[int, np.ndarray]]) -> None:
        from datasketch import MinHashLSH

        self.sizes: dict[int, int] = {}
        """Number of runs of each document that is long enough to be compared."""
        self._holders: list[Counter[int]] = []  # for each passage, how often it occurs in each document
        self._passages: list[np.ndarray] = []
        numbers: dict[bytes, int] = {}  # number of each passage; a repeated passage is stored once
        for document, words in documents:
            if len(words) < MIN_WORDS:
                continue
            runs = _runs(words)
            self.sizes[document] = len(runs)
            for passage in np.array_split(runs, max(1, round(len(runs) / PASSAGE))):
                number = numbers.setdefault(passage.tobytes(), len(numbers))
                if number == len(self._passages):
                    self._passages.append(passage)
                    self._holders.append(Counter())
                self._holders[number][document] += 1
        self._index = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, PERMUTATIONS // BANDS))
        for number, sketch in enumerate(_sketches(self._passages)):
            self._index.insert(number, sketch)

    def repeated(self, words: np.ndarray) -> Repeated:
        """Return the passages that resemble parts of a text, and which of their runs are in it."""
        from datasketch import MinHash

        runs, found, seen = _runs(words), Repeated(), set()
        starts = range(0, len(runs), STEP)
        blocks = list(_sketches([runs[at : at + STEP] for at in starts]))
        for n in range(max(1, len(blocks) - 1)):
            window = runs[n * STEP : n * STEP + PASSAGE]
            if window.tobytes() in seen:  # a repeated window finds the same passages
                continue
            seen.add(window.tobytes())
            sketch = blocks[n] if len(blocks) == 1 else MinHash.union(*blocks[n : n + 2])
            for number in self._index.query(sketch):
                held = np.isin(self._passages[number], window)
                if held.any():
                    _add(found, {number: held})
        return found

    def runs(self, repeated: Repeated) -> Counter[int]:
        """Return the number of marked runs of each document."""
        counts: Counter[int] = Counter()
        for number, mask in repeated.items():
            for document, times in self._holders[number].items():
                counts[document] += times * int(mask.sum())
        return counts


def _runs(words: np.ndarray) -> np.ndarray:
    """Return a hash for each N consecutive words, [words - N + 1] uint32."""
    hashes = np.zeros(len(words) - N + 1, np.uint64)
    for n in range(N):
        hashes = (hashes + words[n : n + len(hashes)]) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64
    return (hashes >> np.uint64(32)).astype(np.uint32)  # all words affect the upper half


def _sketches(sets: Iterable[np.ndarray]) -> Iterator[MinHash]:
    from datasketch import MinHash

    return MinHash.generator((one.tolist() for one in sets), num_perm=PERMUTATIONS, seed=1, hashfunc=int)


def _add(to: Repeated, found: Repeated) -> None:
    for number, mask in found.items():
        if number in to:
            mask = to[number] | mask
        to[number] = mask


Batch = list[tuple[int, np.ndarray]]
"""Documents, or parts of long ones, as (document number, words)."""


def _batches(words: Callable[[int], np.ndarray], documents: Iterable[int]) -> Iterator[Batch]:
    """Yield documents in order. Long ones are cut so that windows overlap across each cut."""
    batch: Batch = []
    size = 0
    for document in documents:
        text = words(document)
        for at in range(0, max(1, len(text) - PASSAGE), BATCH_WORDS):
            part = np.array(text[at : at + BATCH_WORDS + PASSAGE])
            if len(part) < N:
                continue
            batch.append((document, part))
            size += len(part)
            if size >= BATCH_WORDS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _search(batches: Iterable[Batch], index: HeldOut, workers: int) -> Iterator[tuple[int, Repeated]]:
    """Yield, in order, what each document or part of one repeats."""
    if not workers:
        for batch in batches:
            yield from _search_batch(batch, index)
        return
    import ray

    task, place = ray.remote(num_cpus=1)(_search_remotely), ray.put(index)
    # Ray passes on a reference inside a list unresolved, so each process loads the index once, not per task
    for results in in_order(lambda batch: task.remote([place], batch), ray.get, batches, 2 * workers):
        yield from results


def _search_batch(batch: Batch, index: HeldOut) -> Iterator[tuple[int, Repeated]]:
    for document, words in batch:
        yield document, index.repeated(words)


def _search_remotely(place: list[Any], batch: Batch) -> list[tuple[int, Repeated]]:
    return list(_search_batch(batch, _index_at(place[0])))


@functools.lru_cache(maxsize=1)
def _index_at(place: Any) -> HeldOut:
    import ray

    index: HeldOut = ray.get(place)
    return index
