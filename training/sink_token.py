"""Tokenizers with the sink token, a learned token for attention that a head does not need.

A model pretrained with such a token at the start of every sample needs only this token as a sink in
its cache (arXiv:2309.17453, section 3.3). The tokenizer itself adds it, before plain text and in
its chat template, so that plain transformers gives the model the input it was trained on.
"""

from __future__ import annotations

import copy
import json
import tempfile
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

SINK_TOKEN = "<|sink|>"


def with_sink_token(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedTokenizerBase, int]:
    """Return a tokenizer that adds `<|sink|>` before every text (before a BOS), and the token's id.

    The rule is in the post-processor of tokenizer.json, so it survives saving and loading, which is
    tested here. ValueError for a tokenizer that is not a fast one, or whose post-processor is not a
    template or is rebuilt by its class on loading.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer: it has no template for {SINK_TOKEN}")
    known = sink_token_id(tokenizer)
    if known is not None:
        return tokenizer, known
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": [SINK_TOKEN]}, replace_extra_special_tokens=False)
    sink_id = tokenizer.get_vocab()[SINK_TOKEN]

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    rule = _sink_before(spec["post_processor"], sink_id)
    empty = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [], "post_processor": rule}
    tokenizer.backend_tokenizer.post_processor = tokenizers.Tokenizer.from_str(json.dumps(spec | empty)).post_processor
    templates: Any = tokenizer.chat_template  # chats get no special tokens other than those in the template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: SINK_TOKEN + template for name, template in templates.items()}
    elif templates:
        tokenizer.chat_template = SINK_TOKEN + templates
    for flag in ("add_bos_token", "add_eos_token"):  # if saved, they would rebuild the rule on loading
        tokenizer.init_kwargs.pop(flag, None)

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if sink_token_id(AutoTokenizer.from_pretrained(folder, local_files_only=True)) is None:
            raise ValueError(
                f"{type(tokenizer).__name__} drops {SINK_TOKEN} on loading, since it rebuilds its post-processor"
            )
    return tokenizer, sink_id


def sink_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of `<|sink|>` if the tokenizer adds it before every text, else None."""
    known = tokenizer.get_vocab().get(SINK_TOKEN)
    return known if known in tokenizer("").input_ids[:1] else None


def _sink_before(rule: dict[str, Any] | None, sink_id: int) -> dict[str, Any]:
    """Return a post-processor with the sink token first in its template, added if missing."""
    if rule is None or rule["type"] == "ByteLevel":  # ByteLevel only trims offsets
        text, pair = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        template = {"type": "TemplateProcessing", "single": [text], "pair": [text, pair], "special_tokens": {}}
        rule = {"type": "Sequence", "processors": [rule, template] if rule else [template]}
    steps = rule["processors"] if rule["type"] == "Sequence" else [rule]
    if steps[-1]["type"] != "TemplateProcessing":
        raise ValueError(
            f"a post-processor that ends in {steps[-1]['type']} cannot add {SINK_TOKEN}: only templates can"
        )
    piece = {"SpecialToken": {"id": SINK_TOKEN, "type_id": 0}}
    tokens = {SINK_TOKEN: {"id": SINK_TOKEN, "ids": [sink_id], "tokens": [SINK_TOKEN]}}
    last = steps[-1] | {
        "single": [piece, *steps[-1]["single"]],
        "pair": [piece, *steps[-1]["pair"]],
        "special_tokens": steps[-1]["special_tokens"] | tokens,
    }
    return {"type": "Sequence", "processors": [*steps[:-1], last]}
