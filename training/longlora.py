"""Which parameters an arm trains: all, LoRA's, or LongLoRA's LoRA + embeddings + norms.

LoRA alone does not close the gap to full fine-tuning when the context grows; training the
embeddings and the norms beside it does, and costs few parameters (LongLoRA, arXiv:2309.12307,
section 3.3 and table 2).

Embeddings and norms train in place, where peft's `modules_to_save` would keep a frozen copy of each
(113 MB for SmolLM2's embedding) and wrap 61 norms. Only the saved folder says `modules_to_save`,
with peft's key names, so plain peft loads it with the same logits (training/export.py).
"""

from __future__ import annotations

from difflib import get_close_matches

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
    """Set `requires_grad` for the arm; unless it tunes everything, put LoRA layers into `model`.

    LoRA starts at zero, or with what it took out of the base, so logits do not move. ValueError
    where the architecture lacks a target module.
    """
    if arm.tune == "all":
        return model.requires_grad_(True)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=arm.lora_rank,
        lora_alpha=arm.lora_alpha,
        lora_dropout=0.0,  # LongLoRA's; with none, resuming needs no random state
        target_modules=targets_of(model, arm.target_modules),
        use_dora=arm.use_dora,
        use_rslora=arm.use_rslora,
        init_lora_weights="pissa" if arm.init_lora_weights == "pissa" else True,
    )
    adapted = get_peft_model(model, lora)
    if arm.init_lora_weights == "pissa":
        _fill_up_to_rank(adapted, arm.lora_rank)
        start = {name: p.detach().clone() for name, p in adapted.named_parameters() if is_lora_ab(name)}
        vars(adapted)["taken_out"] = start  # of the base: an adapter for the base itself has to give it back
    for name, module in extra_modules(model, arm.tune).items():
        lora.modules_to_save = sorted({*(lora.modules_to_save or ()), name.rpartition(".")[2]})
        module.requires_grad_(True)
    lora.ensure_weight_tying = "embed" in arm.tune and model.config.tie_word_embeddings
    return adapted


def _fill_up_to_rank(model: nn.Module, rank: int) -> None:
    """Give each A and B the rows and columns that PiSSA leaves out: a matrix has only as many
    singular vectors as its smaller side is long, and the saved adapter states one rank for all.

    They are zeros, of which each keeps the other without a gradient: they change nothing.
    """
    for name, p in model.named_parameters():
        if is_lora_ab(name):
            missing = rank - min(p.shape)
            p.data = pad(p.data, (0, missing) if "lora_B" in name else (0, 0, 0, missing))


def is_lora_ab(name: str) -> bool:
    """Return whether a parameter is one of LoRA's two matrices."""
    return "lora_A" in name or "lora_B" in name


def lora_b(model: nn.Module) -> list[nn.Parameter]:
    """Return LoRA's matrices B, whose learning rate LoRA+ raises over that of A."""
    return [p for name, p in model.named_parameters() if "lora_B" in name]


def extra_modules(model: nn.Module, tune: str) -> dict[str, nn.Module]:
    """Return the embeddings (with a tied lm_head) and norms that train beside LoRA, by name."""
    lm, extras = causal_lm(model), tune.split("+")[1:]
    modules = {}
    for name, module in lm.named_modules():
        embeds = "embed" in extras and module is lm.get_input_embeddings()
        norms = "norm" in extras and is_norm(module)
        if embeds or norms:
            modules[name] = module
    return modules


def is_norm(module: nn.Module) -> bool:
    """Return whether it is a LayerNorm, RMSNorm or an architecture's own class of that name."""
    return type(module).__name__.endswith("Norm")


def targets_of(model: nn.Module, targets: tuple[str, ...] | str) -> list[str] | str:
    """Return the layers to adapt, as peft takes them.

    ValueError naming the nearest linear layers if `model` has none of a target's name, or if that
    is its head's.
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
                f"target_modules: {target!r} is the head of {type(model).__name__}, of which the loss reads the weight "
                f"alone: LoRA would never train there; leave it out, or tune 'all'"
            )
        if target not in linear:
            near = ", ".join(get_close_matches(target, linear, n=3, cutoff=0.4))
            hint = f"nearest: {near}" if near else "it has"
            raise ValueError(
                f"target_modules: {type(model).__name__} has no linear layer {target!r}; {hint} "
                f"(of {', '.join(sorted(linear))}); all-linear takes all but the head"
            )
    return list(targets)


def _of_attention(model: nn.Module) -> list[str]:
    """Return the names of the linear layers of a model's attention, where peft has no list for its family."""
    names = set()
    for attention in model.modules():
        if hasattr(attention, "is_causal"):
            for name, module in attention.named_modules():
                if isinstance(module, nn.Linear | Conv1D):
                    names.add(name.rpartition(".")[2])
    return sorted(names)


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Count the trainable parameters by kind. ZeRO-3's partitioned parameters are counted whole."""
    lm = causal_lm(model)
    kinds: dict[int, str] = {}  # by identity: a tied lm_head is the embedding under another name
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
