"""Convert a model folder to a GGUF file for llama.cpp, Ollama and LM Studio.

The file contains weights, stretch and tokenizer. Only Llama (`model_type: llama`) with a byte-level
BPE tokenizer is supported. A model that llama.cpp would read wrongly is refused before anything is
written, and before training if config.json and tokenizer.json show the problem. The gguf library
from llama.cpp's repository maps the names and writes the file, which is then read again and
compared with the weights.

    write_gguf(Path("release"), Path("model-f16.gguf"), "f16", facts=Facts("mine", "apache-2.0"))

torch and gguf are imported only to write a file, since `longreach plan` calls `problem_of`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longreach.infra.lazy import lazy_module

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy_module("numpy")

GgufType = Literal["f16", "q8_0"]
BLOCK = 32  # numbers of a row that share one scale in q8_0
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
AFTER_NUMBERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + AFTER_NUMBERS: "llama-bpe",
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + AFTER_NUMBERS: "qwen2",
}
"""llama.cpp's pre-tokenizer names by the pattern in tokenizer.json, of Llama 3 and Qwen 2."""
SENTENCEPIECE = (
    "a SentencePiece tokenizer (Llama 2's, Mistral's, Gemma's) cannot be written as GGUF here, only byte-level BPE: "
    "release safetensors alone, and give that folder to llama.cpp's convert_hf_to_gguf.py"
)
SPECIAL_ROLES = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True)
class Facts:
    """Metadata of a GGUF file."""

    name: str
    licence: str
    keep: int = 4
    """Number of first tokens that a cache of fixed size always keeps (llama.cpp's n_keep)."""


def gguf_name(recipe: str, arm: str, kind: GgufType) -> str:
    """Return the name of a release's GGUF file."""
    return f"{recipe}-{arm}-{kind}.gguf"


def problem_of(
    config: Mapping[str, Any], tokenizer: Mapping[str, Any], kinds: tuple[GgufType, ...], sink: bool = False
) -> str | None:
    """Return why a model cannot be written as GGUF, and what to do instead; None if it can.

    config, tokenizer: the content of config.json and tokenizer.json.
    sink: whether training will put a sink token before every text.
    """
    if config.get("model_type") != "llama":
        architecture = (config.get("architectures") or [config.get("model_type")])[0]
        return f"{architecture} cannot be written as GGUF, only LlamaForCausalLM can: release safetensors alone"
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            return f"a Llama with {name} cannot be written as GGUF: release safetensors alone"
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {config['hidden_act']!r}, but llama.cpp's Llama has 'silu': release safetensors alone"
    if "q8_0" in kinds:
        widths = {name: config[name] for name in ("hidden_size", "intermediate_size")}
        widths["num_attention_heads * head_dim"] = config["num_attention_heads"] * _head_dim(config)
        for name, width in widths.items():
            if width % BLOCK:
                return f"{name} {width} is not a multiple of {BLOCK}, which q8_0 requires: use f16"
    kind = _rope(config)["rope_type"]
    if kind not in ("default", "linear", "yarn", "llama3"):
        return f"GGUF cannot represent RoPE {kind!r}, only linear, yarn, llama3 and another theta"
    return _tokenizer_problem(tokenizer, sink)


def _tokenizer_problem(tokenizer: Mapping[str, Any], sink: bool) -> str | None:
    try:
        pre_tokenizer_name(tokenizer)
    except ValueError as error:
        return str(error)
    before = len(_before_text(tokenizer)) + sink
    if before > 1:
        return f"the tokenizer puts {before} tokens before each text, but llama.cpp only one: release safetensors alone"
    return None


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer in tokenizer.json.

    Raises:
        ValueError: the tokenizer is not byte-level BPE, or its pre-tokenizer is not known here.
    """
    model, normaliser = tokenizer["model"], tokenizer.get("normalizer")
    if model["type"] == "Unigram" or model.get("byte_fallback"):
        raise ValueError(SENTENCEPIECE)
    if model["type"] != "BPE" or normaliser is not None:
        what = model["type"] if normaliser is None else f"{model['type']} after {normaliser['type']}"
        raise ValueError(f"a tokenizer of {what} cannot be written as GGUF, only byte-level BPE: release safetensors")
    cut = tokenizer.get("pre_tokenizer") or {"type": "none"}
    steps = cut["pretokenizers"] if cut["type"] == "Sequence" else [cut]
    bytes_last = steps[-1]["type"] == "ByteLevel" and not steps[-1]["add_prefix_space"]
    by_regex = bytes_last and steps[-1].get("use_regex", True)
    if by_regex and len(steps) == 1:
        return "gpt-2"
    if len(steps) == 2 and bytes_last:
        first = steps[0]
        if by_regex and first["type"] == "Digits" and first["individual_digits"]:
            return "smollm"
        if first["type"] == "Split" and not by_regex and first["behavior"] == "Isolated":
            name = SPLITS.get(first["pattern"].get("Regex", ""))
            if name:
                return name
    kinds = ", ".join(step["type"] for step in steps)
    raise ValueError(f"the tokenizer's pre-tokenizer ({kinds}) is not one that llama.cpp has: release safetensors")


def _before_text(tokenizer: Mapping[str, Any]) -> list[str]:
    """Return the special tokens that tokenizer.json puts before each text."""
    rule = tokenizer.get("post_processor") or {}
    names = []
    for step in rule.get("processors", [rule]):
        for piece in step.get("single", []):
            if "SpecialToken" not in piece:
                break
            names.append(piece["SpecialToken"]["id"])
    return names


def write_gguf(folder: Path, target: Path, kind: GgufType, *, facts: Facts) -> None:
    """Write a model folder to `target`, matrices as `kind` and norms in float32, and verify it.

    Raises:
        ValueError: the model cannot be written as GGUF, or has numbers beyond float16.
        RuntimeError: the content of the written file does not match the model.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if problem := problem_of(config, tokenizer, (kind,)):
        raise ValueError(f"{target.name}: {problem}")
    # with a temporary file, at most one tensor is in memory
    writer = gguf.GGUFWriter(target, "llama", use_temp_file=True)
    writer.add_name(facts.name)
    writer.add_license(facts.licence)
    writer.add_uint32("longreach.n_keep", facts.keep)
    file_types = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(file_types[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_rope(writer, config)
    _add_tokenizer(writer, folder, config, tokenizer)
    for name, values, quantized in _tensors(folder, config, kind):
        writer.add_tensor(name, _packed(name, values, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _compare(folder, target, config, kind)


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _add_shape(writer: Any, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return RoPE parameters by their current names; before transformers 5, theta was separate."""
    written = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = written.get("rope_type") or written.get("type") or "default"
    return {"rope_theta": config.get("rope_theta", 10_000.0)} | written | {"rope_type": kind}


def _add_rope(writer: Any, config: Mapping[str, Any]) -> None:
    import gguf

    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        factor = rope["factor"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        if attention := _attention_factor(rope):  # llama.cpp multiplies this by the paper's factor
            writer.add_rope_scaling_attn_factors(attention / (0.1 * math.log(factor) + 1))
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name):
                getattr(writer, f"add_rope_scaling_yarn_{name}")(rope[name])


def _attention_factor(rope: Mapping[str, Any]) -> float | None:
    """Return YaRN's factor of attention if the config states it, as such or by DeepSeek's two
    `mscale`; None for the paper's."""
    if rope.get("attention_factor") or not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return rope.get("attention_factor")
    scale, of_all = (0.1 * rope[name] * math.log(rope["factor"]) + 1 for name in ("mscale", "mscale_all_dim"))
    return float(scale / of_all)


def _llama3_divisors(config: Mapping[str, Any]) -> np.ndarray:
    """Return the divisor of each pair's frequency in llama3's RoPE, which llama.cpp reads."""
    rope, dim = _rope(config), _head_dim(config)
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths
    unchanged = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - unchanged) / rope["factor"] + unchanged)).astype(np.float32)


def _add_tokenizer(writer: Any, folder: Path, config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> None:
    import gguf

    rows = config["vocab_size"]
    tokens = [f"[PAD{n}]" for n in range(rows)]  # names for embedding rows without a token
    types = [gguf.TokenType.UNUSED] * rows
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    ids = {}
    for added in tokenizer["added_tokens"]:
        number = ids[added["content"]] = added["id"]
        tokens[number], types[number] = added["content"], gguf.TokenType.USER_DEFINED
        if added["special"]:
            types[number] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True, special_token_types=SPECIAL_ROLES, n_vocab=rows)
    # always set whether BOS is added, because llama.cpp's default depends on the pre-tokenizer
    special.add_special_token["bos"] = False
    for token in _before_text(tokenizer):  # such as the sink token, which is BOS for llama.cpp
        special.special_token_ids["bos"] = ids[token]
        special.add_special_token["bos"] = True
    special.add_to_gguf(writer, quiet=True)


def _tensors(folder: Path, config: Mapping[str, Any], kind: GgufType) -> Iterator[tuple[str, np.ndarray, Any]]:
    """Yield (GGUF name, float32 values in llama.cpp's layout, storage type) of each tensor."""
    import gguf
    import torch
    from safetensors import safe_open

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = config["num_attention_heads"]
    turned = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}
    matrix = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}[kind]
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118 (a shard is not a dictionary)
                if key == "lm_head.weight" and config.get("tie_word_embeddings"):
                    continue  # without an output tensor, llama.cpp uses the embedding
                name = names.get_name(key, try_suffixes=(".weight",))
                if name is None:
                    raise ValueError(f"{folder}: llama.cpp's Llama has no tensor {key}: release safetensors alone")
                values = shard.get_tensor(key).to(torch.float32).numpy()
                if count := turned.get(key.split(".")[-2]):
                    values = _pairs_together(values, count)
                yield name, values, matrix if values.ndim > 1 else gguf.GGMLQuantizationType.F32
    if _rope(config)["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3_divisors(config), gguf.GGMLQuantizationType.F32


def _pairs_together(values: np.ndarray, heads: int) -> np.ndarray:
    """Return a projection with the two rows of each rotated pair adjacent, as in llama.cpp.

    In transformers, they are half a head apart.
    """
    return values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def _packed(name: str, values: np.ndarray, quantized: Any) -> np.ndarray:
    import gguf

    limit = np.finfo(np.float16).max
    # q8_0 stores scales in float16: the largest number of a block divided by 127
    if quantized != gguf.GGMLQuantizationType.F32 and not np.abs(values).max() <= limit:
        raise ValueError(f"{name} has numbers beyond {limit:g}, which float16 cannot hold: release safetensors alone")
    return gguf.quants.quantize(values, quantized)


def _compare(folder: Path, target: Path, config: Mapping[str, Any], kind: GgufType) -> None:
    """Read the file again; RuntimeError if a tensor is missing or differs by more than rounding."""
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
    for name, values, quantized in _tensors(folder, config, kind):
        tensor = found.pop(name, None)
        if tensor is None or tensor.tensor_type != quantized or [*reversed(tensor.shape)] != [*values.shape]:
            raise RuntimeError(f"{target}: {name} is missing, or its type or shape differs from what was written")
        error = float(np.abs(gguf.quants.dequantize(tensor.data, quantized) - values).max())
        allowed = {
            gguf.GGMLQuantizationType.F32: 0.0,
            gguf.GGMLQuantizationType.F16: 2.0**-11,  # half a unit in the last of 11 bits
            gguf.GGMLQuantizationType.Q8_0: 1 / 254 + 2.0**-10,  # half of one of 127 steps, and the scale's rounding
        }[quantized]
        # 2**-25 is half of float16's smallest step, for numbers near 0
        if not error <= allowed * float(np.abs(values).max()) + 2.0**-25:
            raise RuntimeError(f"{target}: {name} differs by {error:.2g} from the weights")
    if found:
        raise RuntimeError(f"{target} has tensors that the model does not have: {', '.join(sorted(found)[:3])}")
