"""Check and save training results: plain Hugging Face models, peft adapters and merged models.

Before a result is saved, each trainable tensor is compared with its value at the start. A merged
model is loaded again with plain transformers, and its logits are compared with the adapter's.
"""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from longreach.training.longlora import is_lora_ab
from longreach.training.loss import causal_lm
from longreach.training.model import fit_embeddings, load_model
from longreach.training.recipe import RopeRecipe
from longreach.training.zero import whole

MERGE_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest allowed logit error of a merged model, relative to the largest logit. It comes from
rounding W + BA to the type, and then from the rounding in each layer. Measured on SmolLM2 in
float32: 4e-6."""


SMALL_BYTES = 2**31
"""Weights up to this size are saved once before training, to check that this works."""


def tensor_digests(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Return the xxh3 hash of each trainable tensor by name, rounded to `dtype` if it is given.

    Under ZeRO-3, the parameters must be gathered first.
    """
    digests = {}
    for name, p in trainable(model).items():
        raw = p.detach().to(dtype or p.dtype).contiguous().view(-1).view(torch.uint8).cpu().numpy()
        digests[name] = xxhash.xxh3_64(raw.data).hexdigest()
    return digests


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save_result(
    model: Any, tokenizer: PreTrainedTokenizerBase, out: Path, *, start: dict[str, str], steps: int
) -> None:
    """Check the training result against `start` (`tensor_digests`), and save the model or adapter.

    Every rank calls this. Only rank 0 saves.
    """
    with whole(model.parameters()):
        if dist.get_rank() == 0:
            check_trained(model, start, steps)
            out.mkdir(parents=True, exist_ok=True)
            if isinstance(model, PeftModel):
                save_adapter(model, out)
            else:
                model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    dist.barrier()


def check_saves(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the untrained model in a private folder and load it again, before training begins.

    For the base of an adapter, which does not change, and for a model above SMALL_BYTES, only the
    config is saved. An adapter's tensors must be found again by the names that they are saved under.

    Raises:
        ValueError: saving or loading fails, or gives different tensors.
    """
    lm: Any = causal_lm(model)
    sizes = [p.numel() * p.element_size() for p in lm.parameters()]
    shutil.rmtree(folder, ignore_errors=True)
    try:
        if lm is model and 0 < sum(sizes) <= SMALL_BYTES:
            model.save_pretrained(folder)
            again = type(model).from_pretrained(folder, dtype=model.dtype, local_files_only=True).state_dict()
            for name, tensor in model.state_dict().items():
                if not torch.equal(again[name], tensor.cpu()):
                    raise ValueError(f"{name} has other values after it is loaded again")
        else:
            lm.config.save_pretrained(folder)
            lm.generation_config.save_pretrained(folder)
            AutoConfig.from_pretrained(folder, local_files_only=True)
        if isinstance(model, PeftModel):
            own = {name: p.detach() for name, p in trainable(model).items() if is_lora_ab(name)}
            saved = {_peft_name(name): tensor for name, tensor in own.items()}
            found: Any = set_peft_model_state_dict(model, saved)
            if lost := sorted(own.keys() & {*found.missing_keys}):
                raise ValueError(f"peft does not find {len(lost)} tensors of the adapter again, such as {lost[0]}")
        tokenizer.save_pretrained(folder)
    except OSError:  # such as a full disk, which is not the model's fault
        raise
    except Exception as error:
        raise ValueError(f"{type(lm).__name__} could not be saved after training: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_trained(model: nn.Module, start: dict[str, str], steps: int) -> None:
    """Raise RuntimeError that names trainable tensors that are empty, not finite, or unchanged.

    Such tensors mean that the saved weights are not those that were trained, or that nothing was.
    """
    empty = [name for name, p in trainable(model).items() if not (p.numel() and p.isfinite().all())]
    end = tensor_digests(model)
    late = {name for name in end if steps == 1 and "lora_A" in name}  # A gets no gradient while B is zero
    same = [name for name in end.keys() - late if end[name] == start[name]]
    remedy = ""
    if any(p.dtype != torch.float32 for p in trainable(model).values()):
        remedy = ": bfloat16 rounds such small steps away; raise the learning rate, or train in float32"
        if len(same) < len(end):  # some tensors may stay the same, usually norms (near 1, bfloat16's step is 0.008)
            same = []
    if empty or same or not end:
        raise RuntimeError(
            f"of {len(end)} trainable tensors {len(empty)} are empty or not finite and {len(same)} unchanged since the "
            f"start ({', '.join((empty + same)[:3])}): the saved result would not be what was trained{remedy}"
        )


def save_adapter(model: PeftModel, out: Path) -> None:
    """Save the trainable tensors as peft names them; embeddings and norms are modules_to_save."""
    tensors = {}
    for name, p in trainable(model).items():
        tensors[_peft_name(name)] = p.detach().cpu().contiguous()
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    if config.init_lora_weights == "pissa":
        config = _of_the_whole_base(config, tensors, vars(model)["taken_out"])
    if config.ensure_weight_tying:  # peft expects a tied embedding's trained values under both names
        embed, head = (model.get_input_embeddings(), model.get_output_embeddings())
        names = {module: name for name, module in model.named_modules()}
        tensors[f"{names[head]}.weight"] = tensors[f"{names[embed]}.weight"].clone()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(out))


def _peft_name(name: str) -> str:
    """Return the name under which peft saves a parameter of an adapter."""
    name = name.replace(".default.", ".")
    if "lora_magnitude_vector" in name:  # from DoRA; peft stores it without the suffix
        name = name.removesuffix(".weight")
    return name


def _of_the_whole_base(
    config: LoraConfig, tensors: dict[str, torch.Tensor], taken_out: Mapping[str, torch.Tensor]
) -> LoraConfig:
    """Convert a PiSSA adapter in place to a LoRA of twice the rank on the original base.

    Return the new config. PiSSA trains B A on the residual W - B0 A0, which is not published. On W,
    the equivalent update is B A - B0 A0 = [B, -B0] [A; A0] (peft calls it `subtract_mutated_init`).
    """
    for name, start in taken_out.items():
        key, start = _peft_name(name), start.cpu()
        if "lora_A" in name:
            tensors[key] = torch.cat([tensors[key], start.to(tensors[key])], dim=0)
        else:
            tensors[key] = torch.cat([tensors[key], -start.to(tensors[key])], dim=1)
    grown = copy.copy(config)
    grown.r = 2 * config.r
    by = math.sqrt(2) if config.use_rslora else 2
    grown.lora_alpha = config.lora_alpha * by  # type: ignore[assignment]  # keeps the scale
    grown.init_lora_weights = True
    return grown


def merge_adapter(base_folder: Path, adapter_folder: Path, out: Path, *, rope: RopeRecipe | None) -> dict[str, Any]:
    """Merge an adapter into its base and save a plain Hugging Face folder, with a stretched config.

    The merged model is loaded again with plain transformers, and its logits on random tokens are
    compared with the adapter's. merge_error is the largest difference over the largest logit.

    Raises:
        RuntimeError: merge_error is above the tolerance of the base's type, or the embeddings are
            tied in only one of base and merged model.
        ValueError: the adapter lacks tensors or is of a kind that cannot be merged.
    """
    dtype = str(AutoConfig.from_pretrained(base_folder).dtype or torch.float32).removeprefix("torch.")
    _check_dtype(base_folder, dtype)
    base, tokenizer = load_model(base_folder, rope=rope)
    tokenizer = _with_tokens_of(adapter_folder, base, tokenizer)
    _untie_where_one_is_adapted(adapter_folder, base)
    probe = _random_tokens(base)
    with torch.no_grad():
        model = _with_adapter(base, adapter_folder).eval()
        expected = model(probe, use_cache=False).logits
        merged = model.merge_and_unload()
        merged.to(getattr(torch, dtype)).save_pretrained(out)
        tokenizer.save_pretrained(out)
        again = AutoModelForCausalLM.from_pretrained(out, local_files_only=True).eval()
        error = float((again(probe, use_cache=False).logits - expected).abs().max() / expected.abs().max())
    tied = again.get_input_embeddings().weight is again.get_output_embeddings().weight
    if not error <= MERGE_TOLERANCE[dtype] or tied != base.config.tie_word_embeddings:
        raise RuntimeError(
            f"merging {adapter_folder}: logits differ by {error:.1e} of the largest one (allowed in {dtype}: "
            f"{MERGE_TOLERANCE[dtype]:.0e}); embeddings tied: {tied}, before the merge: "
            f"{base.config.tie_word_embeddings}"
        )
    return {"merge_error": error, "dtype": dtype, "parameters": causal_lm(again).num_parameters()}


def _random_tokens(model: Any) -> torch.Tensor:
    """Return 128 fixed random tokens, or fewer if the model has fewer positions."""
    text = model.config.get_text_config(decoder=True)
    tokens = min(128, getattr(text, "max_position_embeddings", None) or 128)
    return torch.randint(0, text.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))


def _with_adapter(base: Any, adapter: Path) -> PeftModel:
    """Return a base with an adapter from a folder.

    Raises:
        ValueError: the adapter is of a kind that cannot be merged, or lacks tensors, for which peft
            only warns.
    """
    kind = PeftConfig.from_pretrained(str(adapter))
    if kind.is_prompt_learning:
        raise ValueError(
            f"{adapter} is a {kind.peft_type.value} adapter of peft, which learns tokens before a prompt: these "
            f"cannot be merged"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(base, adapter)
        except UserWarning as error:
            raise ValueError(f"{adapter} lacks tensors that its adapter_config.json requires: {error}") from error


def _with_tokens_of(adapter: Path, base: Any, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the adapter's tokens and chat template, else the base's.

    The base's embedding is resized for added tokens. If the adapter contains an embedding, the
    number of its rows, padding included, is used.
    """
    if (adapter / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(adapter, local_files_only=True)
    elif (adapter / "chat_template.jinja").is_file():
        tokenizer.chat_template = (adapter / "chat_template.jinja").read_text(encoding="utf-8")
    table = base.get_input_embeddings()
    (name,) = [name for name, module in base.named_modules() if module is table]
    with safe_open(adapter / "adapter_model.safetensors", "pt") as saved:
        for key in saved.keys():  # noqa: SIM118 (not a dictionary)
            if key.endswith((f"{name}.weight", f"{name}.base_layer.weight")):
                base.resize_token_embeddings(saved.get_slice(key).get_shape()[0], mean_resizing=False)
            if key.endswith(f"{name}.base_layer.weight"):  # an embedding under LoRA; a tied head has the same weight
                with torch.no_grad():
                    base.get_input_embeddings().weight.copy_(saved.get_tensor(key))
    fit_embeddings(base, tokenizer)
    return tokenizer


def _untie_where_one_is_adapted(adapter: Path, base: Any) -> None:
    """Untie head and embedding if LoRA adapts only one of them, since a merge would change both."""
    head = base.get_output_embeddings()
    (name,) = (name for name, module in base.named_modules() if module is head)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as saved:
        keys = [*saved.keys()]
    adapted = any("lora_embedding_" in key or f".{name}.lora_" in key for key in keys)
    if adapted and head.weight is base.get_input_embeddings().weight:
        base.config.tie_word_embeddings = False
        head.weight = nn.Parameter(head.weight.detach().clone())


def _check_dtype(folder: Path, dtype: str) -> None:
    if dtype not in MERGE_TOLERANCE:
        raise ValueError(f"{folder}: its weights are {dtype}, but only {', '.join(MERGE_TOLERANCE)} can be saved")


def save_in_type(folder: Path, out: Path, dtype: str) -> None:
    """Save a model's config and weights in another dtype, and compare logits on random tokens.

    Both models compute in float32, so that only the rounding of the weights is compared.

    Raises:
        RuntimeError: the logits differ by more than the dtype's tolerance.
    """
    _check_dtype(folder, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    probe = _random_tokens(model)
    with torch.no_grad():
        expected = model(probe, use_cache=False).logits
        model.to(getattr(torch, dtype)).save_pretrained(out)
        again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
        error = float((again(probe, use_cache=False).logits - expected).abs().max() / expected.abs().max())
    if not error <= MERGE_TOLERANCE[dtype]:
        raise RuntimeError(
            f"{folder} in {dtype}: logits differ by {error:.1e} of the largest one, but at most "
            f"{MERGE_TOLERANCE[dtype]:.0e} is allowed"
        )
