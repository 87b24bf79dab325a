"""The text of the recipe that `longreach init` writes, with a comment at each choice."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from longreach.training.corpus_recipe import SourceRecipe

if TYPE_CHECKING:
    from longreach.pipelines.init import Base, Fit
    from longreach.pipelines.init_documents import Documents

THETA_FACTOR = 3
"""Factor on RoPE's base frequency for twice the positions, as in the quickstart (100,000 to
300,000)."""


def recipe_text(name: str, base: Base, documents: Documents, fit: Fit, facts: list[str]) -> str:
    """Return the text of the recipe file."""
    lines = [f"# {name}: written by `longreach init` for these documents, this machine and this time. It found:", "#"]
    lines += [f"#   {_printable(fact)}" for fact in facts]
    lines += [
        "#",
        f"#   longreach plan {name}.yaml       show what would run, and why",
        f"#   longreach run {name}.yaml        run it; a second run has nothing to do",
        "#",
        "# Edit anything; `longreach config schema` explains every field.",
        "",
        f"name: {_text(name)}",
        "",
        "base:",
        f"  source: {_text(base.source)}",
        "",
        "corpus:",
        "  sources:",
        *(f"    - {_source(source)}" for source in documents.sources),
        "  # Held out from training, for the evaluations:",
        f"  test: {_list(documents.test)}",
    ]
    if documents.validation:
        lines += ["  # Held out from training, for choices between experiments:"]
        lines += [f"  validation: {_list(documents.validation)}"]
    if documents.repeating:
        lines += ["  max_overlap: 1  # documents repeat each other, so losses on held-out ones are too low"]
    if documents.malformed:
        share = documents.malformed / documents.entries
        lines += [f"  max_bad_fraction: {min(1.0, share * 1.2 + 0.01):.3f}  # {documents.malformed} are malformed"]
    lines += ["", *_models(base, documents, fit), "", *_evaluations(base, fit), "", *_resources(fit), ""]
    return "\n".join(lines)


def _models(base: Base, documents: Documents, fit: Fit) -> list[str]:
    """Return the sections `baselines` and `finetune`."""
    stretch, why = "{type: none}", "chats teach how to answer: the context length stays the same"
    if not documents.chats:
        why = "the base cannot be stretched, or already is: keep its context length"
    if base.theta and not documents.chats:
        stretch = f"{{type: theta, theta: {base.theta * THETA_FACTOR:.0f}, factor: 2}}"
        why = f"{2 * base.trained:,} positions; this stretch harms short texts least"
    lines = ["# What training has to beat: models without training.", "baselines:", "  base: {}"]
    if base.theta and not documents.chats:
        lines += [f"  stretched: {stretch}"]
    attention = "{pattern: causal}"
    if fit.arm.attention.pattern != "causal":
        groups = fit.seq_len // 4
        annealing = f"anneal_to: causal, anneal_fraction: {fit.arm.attention.anneal_fraction:g}"
        attention = f"{{pattern: shifted_sparse, group_tokens: {groups}, sink_tokens: 4, {annealing}}}"
    lines += [
        "",
        "finetune:",
        f"  rope: {stretch}  # {why}",
        f"  pack: {{seq_len: {fit.seq_len}, method: best_fit}}  # the longest rows that leave time for enough steps",
        f"  steps: {fit.steps}  # about {fit.step_s:.2g} s each",
        f"  global_batch_tokens: {fit.batch}  # one row per rank",
        "  learning_rate: 5e-4  # of the adapters",
        f"  warmup_steps: {max(1, fit.steps // 10)}",
        "  schedule: cosine",
    ]
    if documents.validation and documents.chats == len(documents.chars):
        every = max(1, fit.steps // 4)
        lines += [f"  validate_every_steps: {every}  # the loss on held-out chats' answers"]
    lines += [
        "  arms:",
        "    longlora:  # LongLoRA: adapters, embeddings and norms",
        f"      tune: {fit.arm.tune}",
        "      embedding_learning_rate: 2e-5",
        f"      attention: {attention}",
    ]
    return lines


def _evaluations(base: Base, fit: Fit) -> list[str]:
    lengths = [length for length in (512, 1024) if length <= base.trained]
    lines = ["evaluate:"]
    planned = fit.evaluations
    if planned.gain_documents:
        short, long = planned.gain_lengths
        lines += [
            "  gain:  # the same tokens of test documents, predicted with more and more text before them",
            f"    lengths: [{short}, {long}]",
            f"    base_lengths: [{short}, {base.trained}]  # the other models have to beat the best of them",
            f"    score_tokens: {min(1024, short // 2)}",
            f"    documents: {_list([*planned.gain_documents])}",
            "    choose_on: []  # a choice on validation documents would take more time",
        ]
    if planned.perplexity_lengths:
        lines += ["  perplexity:  # of the test documents", f"    lengths: {list(planned.perplexity_lengths)}"]
    lines += [
        "  passkey:  # find a number hidden in filler sentences",
        f"    lengths: {lengths}",
        "    depths: [0.25, 0.75]",
    ]
    return lines


def _resources(fit: Fit) -> list[str]:
    """Return the section `resources`, which changes no result."""
    where = fit.resources
    lines = ["resources:", f"  workers: {where.workers}  # training ranks"]
    lines += [f"  cpus_per_worker: {where.cpus_per_worker}"]
    if where.gpus_per_worker:
        lines += [f"  gpus_per_worker: {where.gpus_per_worker}"]
    lines += [f"  dtype: {where.dtype}"]
    if where.matmul_precision != "highest":
        lines += [
            f"  matmul_precision: {where.matmul_precision}  # rounds the factors of matrix products to bfloat16, in "
            "which this processor is faster"
        ]
    if where.activation_checkpointing:
        lines += ["  activation_checkpointing: true  # without it, memory would not suffice"]
    return [*lines, f"  eval_cpus: {where.eval_cpus}", "  checkpoint_every_steps: 10"]


def _source(source: SourceRecipe) -> str:
    """Return a source on one line, with the fields that differ from their defaults."""
    chosen = source.model_dump(mode="json", exclude_defaults=True)
    return "{" + ", ".join(f"{key}: {_value(value)}" for key, value in chosen.items()) + "}"


def _value(value: Any) -> str:
    return _list(value) if isinstance(value, list) else _text(str(value))


def _list(values: list[str]) -> str:
    return "[" + ", ".join(_text(value) for value in values) + "]"


def _text(value: str) -> str:
    return _printable(json.dumps(value, ensure_ascii=False))  # YAML's double-quoted form


def _printable(text: str) -> str:
    """Return a text with YAML's escapes for line breaks and all else that YAML does not take as it is."""
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in text)
