"""Tiny models, tokenizers and packed rows for tests, made in milliseconds, offline and reproducibly."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longreach.infra.launch import run_local
from longreach.infra.resources import Resources
from longreach.training.corpus import pack_corpus
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe, SourceRecipe
from longreach.training.model import fresh_llama
from longreach.training.recipe import ArmRecipe, LlamaRecipe, OptimRecipe, RopeRecipe, TrainJob
from longreach.training.summary import PackSummary, TrainingSummary

VOCAB = 64
TINY = LlamaRecipe(hidden=32, layers=2, heads=4, kv_heads=2, context_length=64)


def tiny_tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words w2, w3, ..., split at spaces; ids 0 and 1 are EOS and unknown."""
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, vocab)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


def tiny_folder(folder: Path, seed: int = 0, vocab: int = VOCAB, tied: bool = True) -> Path:
    """Write a Hugging Face folder with a tiny Llama (context length 64) and its tokenizer."""
    model = fresh_llama(TINY, vocab, seed)
    if not tied:
        head = torch.nn.Parameter(
            torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed))
        )
        model.config.tie_word_embeddings = False
        model.lm_head.weight = head
    model.save_pretrained(folder)
    tiny_tokenizer(vocab).save_pretrained(folder)
    return folder


def read_json(path: Path) -> dict:
    return json.loads(Path(path).read_text())


def change_config(folder: Path, **changes) -> None:
    """Change values in a model folder's config."""
    config = read_json(folder / "config.json") | changes
    (folder / "config.json").write_text(json.dumps(config))


def packed_corpus(
    folder: Path, *, seq_len: int = 16, first_token: str = "none", method: str = "best_fit", validation=()
) -> Path:
    """Pack a PackedCorpus of 40 counting documents (w5 w6 w7 ...) with the real packing; two are held out."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for n in range(40):
        (texts / f"count{n:02d}.txt").write_text(" ".join(f"w{2 + (n * 7 + i) % (VOCAB - 2)}" for i in range(5 + n)))
    corpus = CorpusRecipe(
        sources=(SourceRecipe(files=str(texts / "*.txt")),), test=("count0[01]*",), validation=validation
    )
    pack = PackRecipe(seq_len=seq_len, first_token=first_token, method=method)
    (folder / "corpus").mkdir()
    pack_corpus(corpus, pack, tiny_tokenizer(), folder / "corpus")
    return folder / "corpus"


def training_summary(**facts) -> TrainingSummary:
    """Return a plausible summary of a short training; `facts` override its fields."""
    usual = {
        "kind": "finetune", "rope": RopeRecipe(), "arm": ArmRecipe(), "model": None, "sink": "none",
        "sink_mass_every": 0, "optim": OptimRecipe(steps=6, global_batch_tokens=128), "seed": 0,
        "steps": 6, "skipped_steps": 0, "tokens": 768, "targets": 700, "wall_s": 10.0, "checkpoints_s": 0.5,
        "step_s_median": 1.5, "tokens_per_s": 80.0, "loss_first": 5.0, "loss_last": 4.0,
        "total_parameters": 1000, "trainable": dict.fromkeys(("total", "lora", "embed", "norm", "other"), 0),
        "machine": None, "predicted": None, "peak_gib": 1.5, "ranks": 2, "kernel": "sdpa",
        "pattern": "causal()", "pattern_at_the_end": "causal()", "resumed_from_step": 0, "left_after_step": 6,
        "notes": (),
    }  # fmt: skip
    return TrainingSummary(**usual | facts)


def pack_summary(**facts) -> PackSummary:
    """Return a plausible summary of a small packed corpus; `facts` override its fields."""
    usual = {
        "seq_len": 16, "method": "best_fit", "first_token": "none", "first_token_id": None, "eos_token_id": 0,
        "pad_token_id": 0, "vocab_size": VOCAB, "tokenizer_sha256": "", "rows": 8, "tokens": 120, "efficiency": 0.94,
        "documents": {"train": 12, "validation": 0, "test": 0}, "source_digest": "", "document_tokens": {},
        "longer_than_a_row": 0, "truncated_tokens": 0, "length_histogram": (), "bad": {"count": 0, "fraction": 0.0},
    }  # fmt: skip
    return PackSummary(**usual | facts)


def train(todo: dict) -> TrainingSummary:
    """Train in this process, as the only rank."""
    return TrainingSummary.model_validate(run_local("longreach.training.loop:train", todo))


def job(folder: Path, **choices) -> dict:
    """Return a TrainJob as a dict for finetuning a two-layer model in `folder` (base/ and corpus/ are created once);
    `choices` override its fields."""
    if not (folder / "base").exists():
        tiny_folder(folder / "base")
        packed_corpus(folder)
    place = folder / choices.pop("name", "run")
    optim = {"steps": 6, "global_batch_tokens": 64, "learning_rate": 3e-3, "warmup_steps": 2} | choices.pop("optim", {})
    resources = {"workers": 1, "checkpoint_every_steps": 2} | choices.pop("resources", {})
    todo = {
        "kind": "finetune",
        "corpus": str(folder / "corpus"),
        "base": str(folder / "base"),
        "rope": RopeRecipe(type="linear", factor=2.0),
        "optim": OptimRecipe(**optim),
        "resources": Resources(**resources),
        "seed": 0,
        "out": str(place / "out"),
        "work": str(place / "work"),
        "superseded_file": str(place / "superseded"),
    }
    return TrainJob(**todo | choices).model_dump(mode="json")
