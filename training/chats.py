"""Chats and instructions: which columns hold them, and their tokens by the model's own chat
template.

Four forms are known by their columns (FORMS), or named by a source's `format`:

    messages            messages: [{"role": "user", "content": "..."}, ...], and tools if there are any (OpenAI)
    sharegpt            conversations: [{"from": "human", "value": "..."}, {"from": "gpt", ...}, ...]
    prompt_completion   prompt and completion, each a text or a list of messages
    alpaca              instruction and output; input, if there is any, stands below the instruction

A chat is one document, and only what the assistant says is predicted in training. Where that
stands, the template's {% generation %} marks say. A template without them is rendered up to each
answer, with the prompt for it, and up to its end: the answer is the difference. Both have to be
what the whole chat begins with, which is verified for each answer of each chat.

    chats = Chats(tokenizer)
    chats.encode(Conversation(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})))

Reading needs no torch: `longreach plan` imports this.

    pytest tests/test_training_chats.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from longreach.training.readers import Malformed
from longreach.training.recipe import SourceRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Span = tuple[int, int]
"""Where something begins and ends in a text, in characters."""
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
APART = "\ufdd0"
"""A character that stands in no text: Unicode keeps it for the use within a program."""
NOT_SHOWN = (
    "the model's chat template does not show where answers stand ({}): mark them in the base's chat_template.jinja by "
    "{{% generation %}} and {{% endgeneration %}}"
)
TEXT = "text"
"""The form of a record that is a document, not a chat."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Roles by what ShareGPT's `from` says."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with roles, as chat templates take them."""

    messages: tuple[Message, ...]
    tools: Any = None  # functions that the assistant may call, as JSON schemas
    given: int = 0
    """Messages at the beginning that were given: what the assistant says there is not predicted."""

    def texts(self) -> Iterator[str]:
        """Yield what is said; a system message is the same in many chats, and no repetition."""
        for message in self.messages:
            if message["role"] != "system":
                yield f"{message['content']}\n"


def form_of(columns: Collection[str], source: SourceRecipe, where: str) -> str:
    """Return the form of records with such columns: one of FORMS, or TEXT.

    Raises:
        ValueError: they fit two forms, and the source does not say which is meant.
    """
    if source.format != "auto":
        return source.format
    available = set(columns)
    fits = [name for name, form in FORMS.items() if available.issuperset(form.needed)]
    if not fits:
        return TEXT
    if source.text_field in columns:
        fits.insert(0, TEXT)
    if len(fits) > 1:
        raise ValueError(
            f"{where}: the columns {', '.join(columns)} fit the formats {' and '.join(fits)}: say by the source's "
            f"`format` which is meant"
        )
    return fits[0]


def conversation_of(record: Mapping[str, Any], form: str) -> Conversation | Malformed:
    """Return the chat in a record that has the columns of a form, or why there is none."""
    try:
        conversation = FORMS[form].read(record)
        said = [conversation.messages, conversation.tools]
        json.dumps(said, ensure_ascii=False, default=str).encode("utf-8")  # JSON can spell half a surrogate pair
    except RecursionError:
        return Malformed("JSON that is nested too deeply")
    except ValueError as error:
        return Malformed(str(error))
    roles = map(itemgetter("role"), conversation.messages[conversation.given :])
    if "assistant" not in roles:
        return Malformed("a chat without an answer of the assistant: nothing to learn from")
    return conversation


def _messages(record: Mapping[str, Any]) -> Conversation:
    tools = record.get("tools") or None
    if isinstance(tools, str):
        tools = json.loads(tools)
    return Conversation(_listed(record["messages"], "messages"), tools)


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    messages = []
    if isinstance(record.get("system"), str) and record["system"]:
        messages.append({"role": "system", "content": record["system"]})
    turns = record["conversations"]
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise ValueError(f"conversations is {type(turns).__name__}, not a list")
    for number, turn in enumerate(turns, start=1):
        role = turn.get("from") if isinstance(turn, Mapping) else None
        if not isinstance(role, str) or role not in ROLES or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {number} has no `from` of {', '.join(ROLES)} and no `value` that is a text")
        messages.append({"role": ROLES[role], "content": turn["value"]})
    return Conversation(tuple(messages))


def _prompt_completion(record: Mapping[str, Any]) -> Conversation:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    given = _listed(prompt, "prompt")
    return Conversation((*given, *_listed(completion, "completion")), given=len(given))


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    parts = [record["instruction"], record.get("input") or "", record["output"]]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("instruction, input or output is not a text")
    asked = "\n\n".join(filter(None, parts[:2]))
    return Conversation(({"role": "user", "content": asked}, {"role": "assistant", "content": parts[2]}))


def _listed(messages: Any, column: str) -> tuple[Message, ...]:
    """Return messages as templates take them: contents are joined, null fields are left out."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"{column} is {type(messages).__name__}, not a list")
    listed = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} of {column} has no role")
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            texts = []
            for part in content:
                if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                    raise ValueError(f"message {number} of {column} has contents that are no text")
                texts.append(part["text"])
            content = "".join(texts)
        if not isinstance(content, str) and not message.get("tool_calls"):
            raise ValueError(f"message {number} of {column} has a content of {type(content).__name__}, not a text")
        kept = {key: value for key, value in message.items() if value is not None}
        listed.append(kept | {"content": content or ""})
    return tuple(listed)


class Form(NamedTuple):
    """How records hold chats."""

    needed: tuple[str, ...]  # columns
    also: tuple[str, ...]  # columns that are read where there are any
    read: Callable[[Mapping[str, Any]], Conversation]
    """Returns the chat in a record; ValueError says why there is none."""


FORMS = {
    "messages": Form(("messages",), ("tools",), _messages),
    "sharegpt": Form(("conversations",), ("system",), _sharegpt),
    "prompt_completion": Form(("prompt", "completion"), (), _prompt_completion),
    "alpaca": Form(("instruction", "output"), ("input",), _alpaca),
}
"""The forms that chats have, as a source's `format` names them."""


class Encoded(NamedTuple):
    """The tokens of a chat."""

    ids: np.ndarray  # [tokens] int32
    given: np.ndarray  # [tokens] bool: those that are not predicted
    cut: int  # tokens of turns at the end that are left out, since they do not fit


def check_packable(method: str, has_template: bool) -> None:
    """Raise ValueError where that method cannot pack chats, or the base has no template for
    them."""
    if method != "best_fit":
        raise ValueError(
            f"corpus.sources hold chats, which pack.method {method!r} would join with what stands before them: pack "
            f"with 'best_fit'"
        )
    if not has_template:
        raise ValueError(
            "corpus.sources hold chats, and the base has no chat template to write them by: start from an instruct "
            "model, or put a chat_template.jinja into the base's folder"
        )


class Chats:
    """What turns chats into tokens: a tokenizer with its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, first: int | None = None) -> None:
        """Begin with a tokenizer that has a template.

        first: a token that is put before every document, so that a template's own is dropped.
        """
        self.tokenizer, self.first = tokenizer, first
        self.marked = bool(MARKS.search(str(tokenizer.get_chat_template())))
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = sorted((token.content for token in special), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self.swallows = any(token.lstrip or token.rstrip for token in special)

    def encode(self, conversation: Conversation, most: int | None = None, parse: bool = False) -> Encoded:
        """Return a chat's tokens, at most so many: of a longer one the first turns, up to an
        answer.

        parse: what a message says may be special tokens, which end turns and begin others;
        otherwise it is text.

        Raises:
            ValueError: the template refuses the chat, or does not show where answers stand.
        """
        if not parse:
            messages = tuple(self._apart(conversation.messages))
            conversation = Conversation(messages, self._apart(conversation.tools), conversation.given)
        if self.marked:
            text, answers = self._by_marks(conversation)
        else:
            text, answers = self._by_prefixes(conversation)
        ids, start_N, end_N = self._tokens(text)
        predicted = np.zeros(len(ids), bool)
        for begin, end in answers:
            if not self.marked and ((start_N < begin) & (begin < end_N)).any():
                raise ValueError(NOT_SHOWN.format("an answer shares a token with the prompt for it"))
            predicted |= (begin < end_N) & (start_N < end)
        if self.first in ids[:1]:
            ids, predicted = ids[1:], predicted[1:]
        if most is None or len(ids) <= most:
            return Encoded(ids, ~predicted, 0)
        ends = 1 + np.flatnonzero(predicted & ~np.append(predicted[1:], False))
        kept = int(ends[ends <= most].max(initial=0))
        return Encoded(ids[:kept], ~predicted[:kept], len(ids) - kept)

    def _apart(self, value: Any) -> Any:
        """Return what a message says, with APART in the special tokens that it spells: they are
        none."""
        if isinstance(value, str):
            return self.special.sub(lambda found: found[0][0] + APART + found[0][1:], value)
        if isinstance(value, Mapping):
            return {key: self._apart(one) for key, one in value.items()}
        if isinstance(value, Sequence):
            return [self._apart(one) for one in value]
        return value

    def _tokens(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the tokens of what a template wrote, and where each begins and ends, [N] each."""
        if APART not in text:
            return self._encode(text, as_text=False)
        if self.swallows:
            raise ValueError(
                "a message spells a special token, and this tokenizer's swallow blanks beside them: leave it out, or "
                "take it for the token by `special_tokens: parse`"
            )
        parts, at = [], 0
        for piece in re.split(f"({self.special.pattern})", text):  # those that the template wrote
            ids, start_N, end_N = self._encode(piece.replace(APART, ""), as_text=not self.special.fullmatch(piece))
            kept = np.array([at + place for place, char in enumerate(piece) if char != APART], np.int64)
            at += len(piece)
            kept = np.append(kept, at)  # where blanks that a tokenizer trims off its offsets begin and end
            ends_N = np.where(start_N < end_N, 1 + kept[end_N - 1], kept[start_N])
            parts.append((ids, kept[start_N], ends_N))
        ids, start_N, end_N = (np.concatenate(column) for column in zip(*parts, strict=True))
        return ids, start_N, end_N

    def _encode(self, text: str, as_text: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, and where each begins and ends. as_text: special tokens are none."""
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=as_text)
        start_N, end_N = np.array(out["offset_mapping"], np.int64).reshape(-1, 2).T
        return np.array(out["input_ids"], np.int32), start_N, end_N

    def _render(self, conversation: Conversation, *, asks: bool = False, marks: bool = False) -> tuple[str, list[Span]]:
        """Return what the template writes, and where it marks what is generated.

        asks: with the prompt for an answer at the end.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        special: dict[str, Any] = self.tokenizer.special_tokens_map
        try:
            rendered: Any = render_jinja_template(
                conversations=[list(conversation.messages)],
                tools=conversation.tools,
                chat_template=self.tokenizer.get_chat_template(tools=conversation.tools),
                return_assistant_tokens_mask=marks,
                add_generation_prompt=asks,
                **special,
            )
        except Exception as error:  # whatever a template raises: jinja2's errors, TypeErrors
            raise ValueError(
                f"the model's chat template refuses the chat ({type(error).__name__}: {error}): mend the chat, leave "
                f"it out, or change the base's chat_template.jinja"
            ) from error
        (text,), spans = rendered  # annotated as str, but it is texts and what each has marked
        return text, spans[0] if marks else []

    def _by_marks(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Return what the template writes, and where in it answers stand: what it marks."""
        text, spans = self._render(conversation, marks=True)
        first = 0
        if conversation.given:
            given = Conversation(conversation.messages[: conversation.given], conversation.tools)
            before, _ = self._render(given)
            if not text.startswith(before):
                raise ValueError(
                    "the model's chat template writes a prompt otherwise once its answer follows, so that the prompt's "
                    "end is not found: change the base's chat_template.jinja, or give whole chats as `messages`"
                )
            first = len(before)
        return text, [(begin, end) for begin, end in spans if begin >= first]

    def _by_prefixes(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Return what the template writes, and where answers stand: from the prompt to their
        end."""
        whole, _ = self._render(conversation)
        spans = []
        for number, message in enumerate(conversation.messages):
            if message["role"] != "assistant" or number < conversation.given:
                continue
            asked = Conversation(conversation.messages[:number], conversation.tools)
            answered = Conversation(conversation.messages[: number + 1], conversation.tools)
            before, after = self._render(asked, asks=True)[0], self._render(answered)[0]
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError(NOT_SHOWN.format("messages are written otherwise once others follow"))
            spans.append((len(before), len(after)))
        return whole, spans
