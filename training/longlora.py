"""Which parameters an arm trains: all, LoRA's, or LongLoRA's LoRA + embeddings + norms.

LoRA alone does not close the gap to full fine-tuning when the context grows. Training the
embeddings and norms in addition does, and costs few parameters (LongLoRA, arXiv:2309.12307, section
3.3 and table 2).

Embeddings and norms train in place, while peft's `modules_to_save` would keep a frozen copy of each
(113 MB for SmolLM2's embedding) and wrap 61 norms. Only the saved folder uses `modules_to_save`,
with peft's key names, so plain peft loads it with the same logits (training/export.py).
"""

from __future__ import annotations

import re
from difflib import get_close_matches

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from longreach.training.loss import causal_lm
from longreach.training.recipe import ATTENTION_PROJECTIONS, ArmRecipe
from longreach.training.summary import TrainableParameters


def apply_arm(model: PreTrainedModel, arm: ArmRecipe) -> PreTrainedModel | PeftModel:
    """Set `requires_grad` for the arm; unless it tunes everything, add LoRA layers to `model`.

    LoRA starts at zero, or with what was subtracted from the base, so logits do not change.
    ValueError if the architecture lacks a target module or norms, or has norms that peft cannot
    name.
    """
    if arm.tune == "all":
        with torch.device("meta"):
            fresh = dict(type(model)(model.config).named_parameters())
        for name, parameter in model.named_parameters():  # a router's bias, for example, is not for the optimizer
            parameter.requires_grad_(name not in fresh or fresh[name].requires_grad)
        return model
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=arm.lora_rank,
        lora_alpha=arm.lora_alpha,
        lora_dropout=0.0,  # as in LongLoRA; without dropout, resuming needs no random state
        target_modules=targets_of(model, arm.target_modules),
        exclude_modules=_routers(model) if arm.target_modules == "all-linear" else None,
        use_dora=arm.use_dora,
        use_rslora=arm.use_rslora,
        init_lora_weights="pissa" if arm.init_lora_weights == "pissa" else True,
    )
    adapted = get_peft_model(model, lora)
    if arm.init_lora_weights == "pissa":
        _fill_up_to_rank(adapted, arm.lora_rank)
        start = {name: p.detach().clone() for name, p in adapted.named_parameters() if is_lora_ab(name)}
        vars(adapted)["taken_out"] = start  # subtracted from the base; an adapter for the base must add it back
    extra = extra_modules(model, arm.tune)
    if extra:
        lora.modules_to_save = _names_for_peft(model, extra)
    for module in extra.values():
        module.requires_grad_(True)
    lora.ensure_weight_tying = "embed" in arm.tune and model.config.tie_word_embeddings
    return adapted


def _fill_up_to_rank(model: nn.Module, rank: int) -> None:
    """Pad A and B with zeros to the full rank. A matrix has only as many singular vectors as its
    smaller side, so PiSSA may give fewer, but the saved adapter states one rank for all.

    The zeros change nothing: those in A and B keep each other without a gradient.
    """
    for name, p in model.named_parameters():
        if is_lora_ab(name):
            missing = rank - min(p.shape)
            p.data = pad(p.data, (0, missing) if "lora_B" in name else (0, 0, 0, missing))


def is_lora_ab(name: str) -> bool:
    """Return whether a parameter is one of LoRA's two matrices."""
    return "lora_A" in name or "lora_B" in name


def lora_b(model: nn.Module) -> list[nn.Parameter]:
    """Return LoRA's matrices B, for which LoRA+ uses a higher learning rate than for A."""
    return [p for name, p in model.named_parameters() if "lora_B" in name]


def extra_modules(model: nn.Module, tune: str) -> dict[str, nn.Module]:
    """Return, by name, the embeddings (with a tied lm_head) and norms that train in addition to
    LoRA.

    ValueError if norms are to train and the model has none with weights.
    """
    lm, extras = causal_lm(model), tune.split("+")[1:]
    modules = {}
    for name, module in lm.named_modules():
        embeds = "embed" in extras and module is lm.get_input_embeddings()
        norms = "norm" in extras and is_norm(module)
        if embeds or norms:
            modules[name] = module
    if "norm" in extras and not any(map(is_norm, modules.values())):
        raise ValueError(
            f"tune {tune!r}: {type(lm).__name__} has no norms with weights to train: use {tune.replace('+norm', '')!r}"
        )
    return modules


def _names_for_peft(model: nn.Module, chosen: dict[str, nn.Module]) -> list[str]:
    """Return the shortest endings of the chosen modules' names that match no other module.

    peft takes all modules whose name has such an ending, and adds no LoRA inside a module of that
    name (StableLM's norms of single heads are `norms.0`, and `0` would also match the first layer).
    ValueError if a whole name matches others.
    """
    trained = set(map(id, chosen.values()))
    others = [name for name, module in model.named_modules(remove_duplicate=False) if id(module) not in trained]
    names = set()
    for name in chosen:
        parts = name.split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        end = next((end for end in ends if not any(_peft_takes(end, other) for other in others)), None)
        if end is None:
            other = next(other for other in others if _peft_takes(name, other))
            raise ValueError(
                f"{type(model).__name__}: an adapter could not be loaded again, since peft takes {other} for {name}, "
                f"which trains in addition to LoRA: use tune 'lora' or 'all'"
            )
        names.add(end)
    return sorted(names)


def _peft_takes(end: str, name: str) -> bool:
    """Return whether peft treats a module as one of modules_to_save, or as part of one."""
    return name.endswith(end) or f".{end}." in f".{name}."


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a LayerNorm, RMSNorm or an architecture's own class with such a
    name (Nemotron's LayerNorm1P), and has weights."""
    named = re.search("Norm(?![a-z])", type(module).__name__)
    return bool(named) and next(module.parameters(recurse=False), None) is not None


def targets_of(model: nn.Module, targets: tuple[str, ...] | str) -> list[str] | str:
    """Return the layers to adapt, as peft's `target_modules`.

    ValueError if `model` has no linear layer with a target's name (the message lists similar
    names), or if the target is the head.
    """
    if isinstance(targets, str):
        return targets
    head = causal_lm(model).get_output_embeddings()
    linear: set[str] = set()
    heads: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            (heads if module is head else linear).add(name.rpartition(".")[2])
    if targets == ATTENTION_PROJECTIONS and not linear.issuperset(targets):
        model_type = causal_lm(model).config.model_type
        known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type, [])
        own = [name for name in known if name in linear] or _of_attention(model)
        targets = tuple(own) or targets
    for target in targets:
        if target in heads:
            raise ValueError(
                f"target_modules: {target!r} is the head of {type(model).__name__}. The loss reads only its weight, so "
                f"LoRA would never train there: leave it out, or use tune 'all'"
            )
        if target not in linear:
            near = ", ".join(get_close_matches(target, linear, n=3, cutoff=0.4))
            hint = f"nearest: {near}" if near else "it has"
            raise ValueError(
                f"target_modules: {type(model).__name__} has no linear layer {target!r}; {hint} "
                f"(of {', '.join(sorted(linear))}); all-linear takes all but the head"
            )
    return list(targets)


@torch.no_grad()
def _routers(model: nn.Module) -> list[str] | None:
    """Return the names of linear layers that return more than one tensor, such as a choice of
    experts, which peft cannot adapt; None if there are none."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            returned = module(module.weight.new_zeros(1, module.in_features))
            if not isinstance(returned, torch.Tensor):
                names.append(name)
    return names or None


def _of_attention(model: nn.Module) -> list[str]:
    """Return the names of the linear layers in a model's attention, for families unknown to
    peft."""
    names = set()
    for attention in model.modules():
        if hasattr(attention, "is_causal"):
            for name, module in attention.named_modules():
                if isinstance(module, nn.Linear | Conv1D):
                    names.add(name.rpartition(".")[2])
    return sorted(names)


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Count the trainable parameters by kind. ZeRO-3's partitioned parameters count in full."""
    lm = causal_lm(model)
    kinds: dict[int, str] = {}  # by identity, since a tied lm_head is the embedding under another name
    for module in lm.modules():
        if is_norm(module):
            kinds |= dict.fromkeys(map(id, module.parameters()), "norm")
    kinds |= dict.fromkeys(map(id, lm.get_input_embeddings().parameters()), "embed")
    counts = dict.fromkeys(("total", "lora", "embed", "norm", "other"), 0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = kinds.get(id(p), "other")
            if "lora_" in name:
                kind = "lora"
            size = getattr(p, "ds_numel", p.numel())
            counts[kind] += size
            counts["total"] += size
    return TrainableParameters(**counts)
