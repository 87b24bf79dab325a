"""Write docs/models.md: which transformers model families support which ability, tried on tiny models.

    python tests/families.py                # writes docs/models.md
    python tests/families.py llama mamba    # prints these rows

A cell is "yes" if the trial gave the right numbers. Otherwise it is the message of the ValueError
with which longreach refuses, so that commands exit with 2. Any other exception is a bug.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import VOCAB, byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedConfig

from longreach.attention.hf import set_pattern
from longreach.attention.kv_budget import KVBudget
from longreach.attention.sink_cache import SinkCache, reading_sink_cache
from longreach.evaluation.likelihood import check_head, token_nll
from longreach.evaluation.reader import Reader
from longreach.infra.resources import Resources
from longreach.pipelines.chat import chat
from longreach.training.build import build
from longreach.training.convert import convert
from longreach.training.corpus import PackedRows, pack_corpus
from longreach.training.corpus_recipe import CorpusRecipe, PackRecipe, SourceRecipe
from longreach.training.export import check_saves, merge_adapter, save_adapter
from longreach.training.loss import TokenLoss
from longreach.training.model import describe, load_model
from longreach.training.recipe import ArmRecipe, OptimRecipe, RopeRecipe, TrainJob

HEAD = """# Models

longreach accepts every causal language model that transformers' auto classes load from safetensors,
whatever its family. This page shows what works with which family. `python tests/families.py` writes it:
it builds a tiny model of each family with random weights and does what the commands do. "Yes" means that
the results were compared and agree:

- **convert**: the converted model has the same logits.
- **evaluate**: every token's NLL, and answers that reuse a prompt's prefix, equal those of a plain forward pass.
- **kv-cache**: the size in bytes equals that of transformers' own cache.
- **sink cache**: a text that fits, read in pieces, has the same logits. **chat** is `longreach chat` with this cache.
- **tune: all**, **LoRA**: one step of training; the loss of packed documents equals that of the documents alone,
  every trainable tensor has a gradient, and the model can be saved. A merged adapter has the same logits.
- **S²**: one step with LongLoRA's shifted groups, which use transformers' attention interface.
- **stretch**: another RoPE changes the logits, and a saved model keeps it.

A number means that longreach refuses, with the numbered message below and exit code 2, before it trains anything.

"""
WHY_NOT = """

## Why not

"""
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
POSITIONS = 64
YARN = RopeRecipe(type="yarn", factor=2)

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
ALL_HEADS = {name: size for name, size in LLAMA_LIKE.items() if name != "num_key_value_heads"}
HEADS_OF_8 = {"head_dim": 8}
PARTLY_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
WINDOWED = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    **EXPERTS,
}
TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
OF_GPT2 = {"n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", LLAMA_LIKE),
    "mistral": ("Mistral", {**LLAMA_LIKE, "sliding_window": None}),
    "mistral, windowed": ("Mistral", {**LLAMA_LIKE, "sliding_window": 24}),
    "qwen2": ("Qwen2", LLAMA_LIKE),
    "qwen3": ("Qwen3", {**LLAMA_LIKE, **HEADS_OF_8}),
    "phi3": ("Phi3", {**LLAMA_LIKE, "sliding_window": None}),
    "phi": ("Phi", LLAMA_LIKE),
    "gemma": ("Gemma", {**LLAMA_LIKE, **HEADS_OF_8}),
    "gemma2": ("Gemma2", {**LLAMA_LIKE, **HEADS_OF_8, **WINDOWED}),
    "gemma3, text": ("Gemma3Text", {**LLAMA_LIKE, **HEADS_OF_8, **WINDOWED}),
    "gemma3, with images": (
        "Gemma3",
        {"text_config": {**LLAMA_LIKE, **HEADS_OF_8, **WINDOWED}, "vision_config": TINY_VISION},
    ),
    "gemma4, text": (
        "Gemma4Text",
        {**LLAMA_LIKE, **HEADS_OF_8, **WINDOWED, "global_head_dim": 16, "hidden_size_per_layer_input": 8},
    ),
    "granite": ("Granite", {**LLAMA_LIKE, "logits_scaling": 2.0}),
    "granite-swa": ("GraniteSWA", {**LLAMA_LIKE, "layer_types": ["full_attention"] * 2}),
    "hyperclovax": ("HyperCLOVAX", {**LLAMA_LIKE, "logits_scaling": 0.25}),
    "gpt-oss": ("GptOss", {**LLAMA_LIKE, **HEADS_OF_8, **WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2", LLAMA_LIKE),
    "olmo3": ("Olmo3", {**LLAMA_LIKE, **WINDOWED}),
    "smollm3": ("SmolLM3", {**LLAMA_LIKE, "no_rope_layer_interval": 2}),
    "stablelm": ("StableLm", {**LLAMA_LIKE, **PARTLY_ROTARY}),
    "nemotron": ("Nemotron", {**LLAMA_LIKE, **PARTLY_ROTARY}),
    "cohere": ("Cohere", LLAMA_LIKE),
    "glm4": ("Glm4", {**LLAMA_LIKE, **HEADS_OF_8}),
    "internlm3": ("InternLM3", {**LLAMA_LIKE, **HEADS_OF_8}),
    "diffllama": ("DiffLlama", LLAMA_LIKE),
    "starcoder2": ("Starcoder2", LLAMA_LIKE),
    "mixtral": ("Mixtral", {**LLAMA_LIKE, "num_local_experts": 4, "sliding_window": None}),
    "phimoe": ("Phimoe", {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "jetmoe": ("JetMoe", {**LLAMA_LIKE, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ernie4.5-moe": ("Ernie4_5_Moe", {**LLAMA_LIKE, "moe_intermediate_size": 16, "moe_num_experts": 4, "moe_k": 2}),
    "laguna": (
        "Laguna",
        {
            **LLAMA_LIKE,
            **HEADS_OF_8,
            **EXPERTS,
            "layer_types": ["full_attention"] * 2,
            "num_attention_heads_per_layer": [4, 4],
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3-moe": ("Qwen3Moe", {**LLAMA_LIKE, **HEADS_OF_8, **EXPERTS, "num_experts": 4}),
    "deepseek-v3": ("DeepseekV3", {**LLAMA_LIKE, **LATENT, "num_key_value_heads": 4}),
    "gpt2": ("GPT2", OF_GPT2),
    "gpt-neox": ("GPTNeoX", {**ALL_HEADS, **PARTLY_ROTARY}),
    "falcon": ("Falcon", {**ALL_HEADS, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "opt": ("OPT", {**ALL_HEADS, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "rwkv": ("Rwkv", {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
}


def config_of(family: str) -> PreTrainedConfig:
    """Return a tiny config of a family, with the toy tokenizer's ids."""
    name, choices = FAMILIES[family]
    tokens = {"vocab_size": VOCAB, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    if "text_config" in choices:
        choices = {**choices, "text_config": {**choices["text_config"], **tokens}, "mm_tokens_per_image": 4}
    else:
        choices = {**choices, **tokens}
    return getattr(transformers, f"{name}Config")(**choices)


def make(family: str, folder: Path) -> Path:
    """Write a tiny random model of a family, with the toy tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(family))
        for p in model.parameters():  # otherwise all logits are about 0, whatever the attention does
            if p.dim() > 1:
                p.data.normal_(std=0.3)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def packed(model: Path) -> Path:
    """Return the folder of packed rows: 32 tokens each, of several documents, from the model's tokenizer."""
    folder = model / "rows"
    if folder.exists():
        return folder
    (folder / "texts").mkdir(parents=True)
    for n in range(8):
        (folder / "texts" / f"{n}.txt").write_text("river stone garden winter letter"[: 4 + 3 * n])
    sources = (SourceRecipe(files=str(folder / "texts" / "*.txt")),)
    recipe = CorpusRecipe(sources=sources, test=("0*",), max_overlap=None)
    pack_corpus(recipe, PackRecipe(seq_len=32), AutoTokenizer.from_pretrained(model), folder)
    return folder


def converted(folder: Path) -> None:

    convert(str(folder), folder / "converted")
    assert describe(folder / "converted")["context_length"] in (POSITIONS, None)
    again, first = load_model(folder / "converted")[0], load_model(folder)[0]
    assert torch.equal(_logits(again), _logits(first))


def evaluated(folder: Path) -> None:

    model, tokenizer = load_model(folder)
    check_head(model)
    ids = torch.arange(2, 42)
    nll = token_nll(model.eval(), ids, "here")
    expected = torch.nn.functional.cross_entropy(_logits(model, ids[None])[0, :-1], ids[1:], reduction="none")
    torch.testing.assert_close(torch.as_tensor(nll, dtype=torch.float32), expected, rtol=1e-3, atol=1e-3)
    reader, fresh = Reader(model, tokenizer), Reader(model, tokenizer, reuse=False)
    for start in (30, 31):
        prompt = [*range(2, 30), start]
        answers = [one.answer(prompt, [5, 6], "here", new_tokens=2) for one in (reader, fresh)]
        assert abs(answers[0].nll - answers[1].nll) < 1e-3


def chatted(folder: Path) -> None:

    said = iter(["hello", "go on", ""])
    chat(str(folder), sinks=2, window=8, max_new_tokens=12, temperature=0.0, ask=lambda: next(said))


def streamed(folder: Path) -> None:

    model = load_model(folder)[0].eval()
    ids = torch.arange(2, 14)[None]
    expected = _logits(model, ids)
    cache = SinkCache(model.config, 2, 16)
    with reading_sink_cache(model), torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split((7, 1, 4), dim=1)]
        got = torch.cat(parts, 1)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def counted(folder: Path) -> None:

    budget = KVBudget.of(AutoConfig.from_pretrained(folder))
    model = load_model(folder)[0].eval()
    with torch.no_grad():
        cache = model(torch.arange(2, 14)[None], past_key_values=DynamicCache(config=model.config)).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert budget.bytes(1, 12, "fp32") == real, (budget, real)


def tuned(folder: Path) -> None:
    _train_once(folder, tune="all")


def sparse(folder: Path) -> None:
    _train_once(folder, tune="all", attention={"pattern": "shifted_sparse", "group_tokens": 16})


def adapted(folder: Path) -> None:
    _merged(folder, tune="lora+embed+norm")


def adapted_everywhere(folder: Path) -> None:
    _merged(folder, tune="lora", target_modules="all-linear")


def stretched(folder: Path) -> None:

    worked, refused = [], None
    for rope in (RopeRecipe(type="theta", theta=7e6, factor=2), RopeRecipe(type="linear", factor=2), YARN):
        try:
            model, tokenizer = load_model(folder, rope=rope)
        except ValueError as error:
            refused = error
            continue
        model.save_pretrained(folder / rope.type)
        tokenizer.save_pretrained(folder / rope.type)
        again = load_model(folder / rope.type)[0]
        assert torch.equal(_logits(again), _logits(model))
        assert not torch.equal(_logits(again), _logits(load_model(folder)[0]))
        worked.append(rope.type)
    if refused:
        raise ValueError(f"{', '.join(worked) or 'none'} only: {refused}" if worked else str(refused))


ABILITIES: dict[str, Callable[[Path], None]] = {
    "convert": converted,
    "evaluate": evaluated,
    "kv-cache": counted,
    "sink cache": streamed,
    "chat": chatted,
    "tune: all": tuned,
    "S²": sparse,
    "LoRA, embeddings and norms": adapted,
    "LoRA, all-linear": adapted_everywhere,
    "stretch": stretched,
}


def _logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return a model's logits of a row."""
    with torch.no_grad():
        return model.eval()(torch.arange(2, 34)[None] if ids is None else ids, use_cache=False).logits.float()


def _train_once(folder: Path, **arm: Any) -> Any:
    """Build a model as training does, and do one step; check that the packed loss is that of the documents alone."""

    corpus = packed(folder)
    rows = PackedRows(corpus)
    work = folder / "work"
    job = TrainJob(
        kind="finetune", corpus=str(corpus), base=str(folder), arm=ArmRecipe(**arm), seed=0, resources=Resources(),
        optim=OptimRecipe(steps=1, global_batch_tokens=64), out=str(work), work=str(work),
        superseded_file=str(work / "superseded"),
    )  # fmt: skip
    model, tokenizer = build(job, rows.summary)
    check_saves(model, tokenizer, work / "untrained")
    pattern = job.arm.attention.pattern_at(0, 1)
    set_pattern(model, pattern)
    batch = rows.batch([0, 1])
    loss = TokenLoss(model)(**batch, scale=1.0)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if pattern.pattern == "causal":
        plain, alone = load_model(folder)[0].eval(), 0.0
        for ids, positions, labels in zip(batch["input_ids"], batch["position_ids"], batch["labels"], strict=True):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for start, end in pairwise(starts):
                logits = _logits(plain, ids[None, start:end])[0]
                wanted = labels[start + 1 : end]
                kept = wanted != -100
                one = torch.nn.functional.cross_entropy(logits[:-1][kept], wanted[kept], reduction="sum")
                alone += float(one) if kept.any() else 0.0
        assert abs(alone - float(loss)) < 1e-3 * alone, f"packed loss {float(loss)}, of documents alone {alone}"
    return model, tokenizer


def _merged(folder: Path, **arm: Any) -> None:
    """Train an adapter for one step, save it as training does, and merge it."""

    model, tokenizer = _train_once(folder, **arm)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    out = folder / f"adapter-{arm['tune']}"
    out.mkdir()
    save_adapter(model, out)
    tokenizer.save_pretrained(out)
    merge_adapter(folder, out, folder / f"merged-{arm['tune']}", rope=None)


def row_of(family: str) -> dict[str, str]:
    """Return the cells of a family by ability: "yes", or the reason why not."""
    cells = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = make(family, Path(scratch, "model"))
        for name, ability in ABILITIES.items():
            try:
                ability(folder)
                cells[name] = "yes"
            except ValueError as error:
                cells[name] = " ".join(str(error).replace(str(folder), "MODEL").split())
    return cells


def page(rows: dict[str, dict[str, str]]) -> str:
    """Return the content of docs/models.md: the table, and below it a numbered list of the reasons."""
    reasons: dict[str, int] = {}
    lines = [f"| {' | '.join(['family', *ABILITIES])} |", f"|{' --- |' * (1 + len(ABILITIES))}"]
    for family, cells in rows.items():
        shown = [family]
        for says in cells.values():
            if says != "yes":
                says = f"[{reasons.setdefault(says, len(reasons) + 1)}](#why-not)"
            shown.append(says)
        lines.append(f"| {' | '.join(shown)} |")
    listed = [f"{number}. {escape(reason)}" for reason, number in reasons.items()]
    return HEAD + "\n".join(lines) + WHY_NOT + "\n".join(listed) + "\n"


def escape(text: str) -> str:
    """Return text with Markdown's special characters escaped."""
    return re.sub(r"([*_`|<>\[\]])", r"\\\1", text)


if __name__ == "__main__":
    asked = sys.argv[1:]
    rows = {}
    for family in asked or FAMILIES:
        rows[family] = row_of(family)
        if asked:
            print(family, *(f"  {name}: {says}" for name, says in rows[family].items()), sep="\n", flush=True)
    if not asked:
        PAGE.write_text(page(rows), encoding="utf-8")
