"""Byte-level BPE tokenizers with the pre-tokenizers of well-known models, trained on a few lines in milliseconds."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from longreach.training.tokenise import LLAMA3_SPLITS

LINES = [
    "It was the best of times, it was the worst of times, it was the age of wisdom, 1859.",
    "We're told that they'll come; he's said: don't! (They've 12 ships, 345 men and 6,789 oxen.)",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 22))\r\n",
    "Überraschung, naïve café — 你好，世界。\n日本語のテキスト\n",
]


def _byte_level(use_regex: bool = True, add_prefix_space: bool = False) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def _split(regex: str) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), _byte_level(use_regex=False)])


PRE_TOKENIZERS = {
    "gpt2": lambda: _byte_level(),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()]),
    "llama3": lambda: _split(LLAMA3_SPLITS[0]),
    "qwen2": lambda: _split(LLAMA3_SPLITS[1]),
}


def toy_core(family: str = "gpt2") -> Tokenizer:
    """Return a tokenizer with 600 tokens, of which the first three are <eos>, <bos> and <mark>."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = PRE_TOKENIZERS[family]()
    core.normalizer = normalizers.NFC() if family == "qwen2" else None
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(token, special=True) for token in ("<eos>", "<bos>", "<mark>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(LINES * 3, trainer)
    return core


def toy_tokenizer(family: str = "gpt2", adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Return the tokenizer of `toy_core` for transformers; it pads with EOS."""
    core = toy_core(family)
    if adds_bos:
        bos = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 1)])
        core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", pad_token="<eos>")
