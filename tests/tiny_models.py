"""A tiny random Llama and a byte tokenizer, for tests of evaluations in which the weights do not matter."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 260


def tiny_llama(seed=0, **changes):
    """Return a Llama with grouped-query attention (4 heads, 2 KV heads) and weights large enough for predictions to
    differ."""
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.3,
        }
        | changes
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def byte_tokenizer(first=None):
    """Return a tokenizer with one token per byte, which puts `first` before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: n for n, symbol in enumerate(alphabet)} | {"<eos>": 256, "<sink>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if first:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, vocab[first])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", additional_special_tokens=["<sink>"])
