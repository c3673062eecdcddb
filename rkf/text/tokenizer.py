"""Text to token ids and back, with the model's own tokenizer.json; text as a stream. Knows no model and no sampling.

The `tokenizers` library runs tokenizer.json unchanged. Nothing of a tokenizer is reimplemented here.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from itertools import islice
from typing import Any

import tokenizers

from rkf.errors import StructureError, UsageError, naming
from rkf.file.container import Container
from rkf.format.constants import CHAT_TEMPLATE, TOKENIZER
from rkf.model.metadata import ModelMetadata
from rkf.text import template as chat_template
from rkf.text.spelling import Spelling
from rkf.text.template import Message
from rkf.text.tokenizer_json import ending, load, one_line, to_json

_INCOMPLETE = "\ufffd"  # a decoder's output for bytes that are not a whole character (yet)
_CHARACTER_BYTES = 4  # maximum in UTF-8; a token adds at least one byte

_PIECE = 1 << 15  # characters encoded at a time; each takes 100 to 700 bytes
_BETWEEN_WORDS = re.compile(r"\S(?=\s\S)")
_SEARCHED, _TRIED = 4096, 8  # characters, places
_CONTEXT = 64  # characters
_MARK_DIGITS = 30  # digits survive what templates do to a text (trim, upper, tojson, …); 100 bits cannot be guessed
_ROLE = re.compile(r"[\w-]+")


class Tokenizer:
    """The tokenizer.json, chat template and special token ids of one model.

    ending: the tokens that tokenizer.json puts behind a text, as models for embeddings want them; `encode` does not.
    """

    def __init__(self, tokenizer_json: bytes, model: ModelMetadata, template: str | bytes | None = None) -> None:
        """StructureError: tokenizer.json is not valid, or has ids beyond the model's vocabulary, or the template is not
        UTF-8.
        """
        self._tokenizer = load(tokenizer_json)
        behind = ending(self._tokenizer)
        self.ending = behind if all(token < model.vocab_size for token in behind) else ()
        self._tokenizer.post_processor = None  # it could repeat a text; BOS is put before one here
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if self.vocab_size > model.vocab_size:
            raise StructureError(
                f"tokenizer.json: {self.vocab_size} tokens, expected at most {model.vocab_size} as the model has"
            )
        try:
            self.template = template.decode() if isinstance(template, bytes) else template
        except UnicodeDecodeError as error:
            raise StructureError(f"chat_template.jinja: expected UTF-8: {error}") from None
        self._model = model

    def encode(self, text: str, *, bos: bool = True, enough: int | None = None, special: bool = True) -> list[int]:
        """Token ids of `text`. bos: start with BOS if the model wants it. special: recognise special tokens in it;
        otherwise they are text.

        enough: how many tokens suffice; the rest of a long text is then not encoded. Raises UsageError for a lone
        surrogate, StructureError if the tokenizer fails.
        """
        ids: list[int] = []
        encoding = self._encoding if special else self._plain_encoding
        for piece in self._pieces(text, encoding):
            ids += encoding(piece).ids
            if enough is not None and len(ids) >= enough:
                break
        if bos and self._model.add_bos and self._model.bos_id is not None and ids[:1] != [self._model.bos_id]:
            ids.insert(0, self._model.bos_id)
        return ids

    def _pieces(self, text: str, encoding: Callable[[str], tokenizers.Encoding]) -> Iterator[str]:
        """The text in parts that can be encoded one by one, so that a long one takes little memory and linear time."""
        try:
            text.encode()
        except UnicodeEncodeError:
            reason = "it holds a lone surrogate (an undecodable byte?)"
            raise UsageError(f"the text is not valid Unicode: {reason}") from None
        start = 0
        while len(text) - start > 2 * _PIECE:
            end, following = _seam(text, start + _PIECE, encoding)
            yield text[start:end]
            start = following
        yield text[start:]

    def _encoding(self, text: str) -> tokenizers.Encoding:
        with one_line("tokenizer.json: a text cannot be encoded"):
            return self._tokenizer.encode(text, add_special_tokens=False)

    def _plain_encoding(self, text: str) -> tokenizers.Encoding:
        """As `_encoding`, with special tokens as text."""
        with one_line("tokenizer.json: a text cannot be encoded"):
            return self._without_special[0].encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids. special: show special tokens instead of leaving them out."""
        with one_line("tokenizer.json: tokens cannot be decoded", quiet=False):
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=not special)
            return text

    @property
    def json(self) -> str:
        """The tokenizer as tokenizer.json. Raises StructureError."""
        with one_line("tokenizer.json"):
            return to_json(self._tokenizer)

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether both have the same tokens, each with the same id."""
        return self._tokenizer.get_vocab() == other._tokenizer.get_vocab()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for a conversation, up to the start of the answer. UsageError: the model has no template.

        tools, variables, now, add_generation_prompt: as for `rkf.text.template.render`.
        """
        if self.template is None:
            raise UsageError("this model has no chat template: give a plain prompt (--raw)")
        return chat_template.render(
            self.template,
            messages,
            special_tokens=self._special_tokens(),
            tools=tools,
            variables=variables,
            now=now,
            add_generation_prompt=add_generation_prompt,
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> list[int]:
        """Token ids of `render`. Special tokens are only those that the template writes: where a message, a tool or an
        argument spells one, it is encoded as ordinary text. Roles are the caller's words: check those of strangers. The
        template writes BOS itself if the model wants one. A prompt beyond the context may be cut, but never to fit.

        Raises what `render` raises, and UsageError for a role that is not a word.
        """
        for message in messages:
            role = message.get("role") if isinstance(message, Mapping) else None
            if not isinstance(role, str) or not _ROLE.fullmatch(role):
                raise UsageError(f"messages: expected a role, which is a word, in each, got {role!r}")
        enough = self._model.context_length + 1
        mark = "".join(secrets.choice(string.digits) for _ in range(_MARK_DIGITS))
        text = self.render(
            self._spelling.broken(messages, mark),
            tools=self._spelling.broken(tools, mark),
            variables=self._spelling.broken(variables, mark),
            now=now,
        )
        if mark not in text and not self._normalised:
            return self.encode(text, bos=False, enough=enough)
        if len(text) > _PIECE and len(ids := self.encode(text.replace(mark, ""), bos=False, enough=enough)) >= enough:
            return ids
        return self._encode_marked(text, mark)

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Token ids of a text; what a mark stands in is not a special token."""
        encoding = self._encoding(text)
        found, ids = encoding.ids, list[int]()
        start = first = 0  # of the part since the last special token: its first character, its first token
        for at, (token, (begin, end)) in enumerate(zip(found, encoding.offsets, strict=True)):
            # A token that only normalising made equal to a special one was not written by a template.
            if token in self._special and self._special[token] in text[begin:end]:
                ids += self._ordinary(text[start:begin], found[first:at], mark, start == 0)
                ids.append(token)
                start, first = end, at + 1
        return ids + self._ordinary(text[start:], found[first:], mark, start == 0)

    def _ordinary(self, text: str, ids: list[int], mark: str, begins: bool) -> list[int]:
        """Token ids of a part between special tokens. ids: those of the text with its marks. begins: no token comes
        before it, so that it gets the space which some tokenizers put before a text.
        """
        if mark not in text and self._special.keys().isdisjoint(ids):
            return ids
        ids = self._as_text(text.replace(mark, ""), begins)
        if self._special.keys().isdisjoint(ids):
            return ids
        # The vocabulary has a special token's text among its ordinary pieces: encode its parts alone.
        parts = text.split(mark)
        return [each for at, part in enumerate(parts) for each in self._as_text(part, begins and at == 0)]

    def _as_text(self, text: str, begins: bool) -> list[int]:
        """Token ids of a text without special tokens, which begins the prompt or follows a token."""
        with one_line("tokenizer.json: a text cannot be encoded"):
            tokenizer, anchor = self._without_special
            if begins:
                return list(tokenizer.encode(text, add_special_tokens=False).ids)
            return list(tokenizer.encode(anchor + text, add_special_tokens=False).ids[1:])

    @cached_property
    def _special(self) -> dict[int, str]:
        """Id -> text of the special tokens."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token: each.content for token, each in added.items() if each.special}

    @cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self._special.values())

    @cached_property
    def _normalised(self) -> bool:
        """Whether texts other than its own may become a special token."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return self._tokenizer.normalizer is not None and any(each.special and each.normalized for each in added)

    @cached_property
    def _without_special(self) -> tuple[tokenizers.Tokenizer, str]:
        """The tokenizer as one that knows no special tokens, and the text of a token to put before other text. Use it
        under `one_line`.
        """
        tokenizer = tokenizers.Tokenizer.from_str(to_json(self._tokenizer))
        tokenizer.encode_special_tokens = True
        anchor = secrets.token_hex()
        tokenizer.add_tokens([tokenizers.AddedToken(anchor, special=False, normalized=False)])
        return tokenizer, anchor

    def _special_tokens(self) -> dict[str, str]:
        """Name -> text, as the file has them; a file that names none has the ids of two."""
        if self._model.special_tokens:
            return {name: token.text for name, token in self._model.special_tokens.items()}
        ids = {"bos_token": self._model.bos_id, "eos_token": next(iter(self._model.eos_ids), None)}
        return {name: self._tokenizer.id_to_token(i) or "" for name, i in ids.items() if i is not None}

    def stream(self, context: Sequence[int] = (), *, special: bool = False) -> TextStream:
        """A decoder for ids that arrive one by one. context: earlier ids, whose text is not repeated. special: show
        special tokens.
        """
        return TextStream(partial(self.decode, special=special), context, () if special else self._special)


def _seam(text: str, at: int, encoding: Callable[[str], tokenizers.Encoding]) -> tuple[int, int]:
    """The end of a part and the start of the next, at `at` or soon after: between words, where both sides have the
    tokens that they have together. Some tokenizers put the space there themselves. In a text without such a place
    it is `at`.
    """
    for found in islice(_BETWEEN_WORDS.finditer(text, at, at + _SEARCHED), _TRIED):
        end = found.end()
        before, after = text[max(0, end - _CONTEXT) : end], text[end : end + _CONTEXT]
        left, both = encoding(before).ids, encoding(before + after).ids
        for following in (end, end + 1):
            if both == left + encoding(text[following : end + _CONTEXT]).ids:
                return end, following
    return at, at


def open_tokenizer(container: Container) -> Tokenizer:
    """The tokenizer of a model's file. Raises UsageError: a file without a model, and StructureError."""
    tokenizer_json = container.blob(TOKENIZER)
    if container.model is None or tokenizer_json is None:
        raise UsageError(f"{container.path}: expected a whole model with its tokenizer, got a file without one")
    with naming(container.path):
        return Tokenizer(tokenizer_json, container.model, container.blob(CHAT_TEMPLATE))


class TextStream:
    """Decodes token by token. The pieces joined equal the whole text decoded, and no piece ends inside a character.

    It decodes one window at a time: the last complete piece and the tokens since. The last piece is included because
    some decoders, such as SentencePiece models', strip a leading space and would strip it between words. A window
    always starts at the start of a character. skipped: tokens that `decode` leaves out wherever they are.
    """

    _context: list[int]  # the tokens of the last complete piece
    _before: str  # the text of that piece
    _pending: list[int]  # the tokens since that piece
    _sent: int  # characters of the pending text already returned

    def __init__(
        self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = (), skipped: Collection[int] = ()
    ) -> None:
        self._decode, self._skipped = decode, skipped
        self._begin(list(context))

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        if token in self._skipped:
            return ""
        self._pending.append(token)
        text = self._text()
        if not text.endswith(_INCOMPLETE):
            new = text[self._sent :]
            # Before any text a token without one may be the space that was stripped; without it the next would be.
            began = self._context if self._before else self._context + self._pending
            self._begin(self._pending if text else began)
            return new
        if len(self._pending) <= _CHARACTER_BYTES:
            return ""
        # All characters but the last are final; a tail of up to three bytes may still grow.
        tail = len(text) - len(text.rstrip(_INCOMPLETE))
        settled = len(text) - min(tail, _CHARACTER_BYTES - 1)
        new = text[self._sent : settled]
        self._sent = max(self._sent, settled)
        return new

    def finish(self) -> str:
        """The remaining bytes that never became a character, as U+FFFD."""
        text = self._text()[self._sent :]
        self._begin(self._pending)
        return text

    def _begin(self, context: list[int]) -> None:
        self._context, self._pending, self._sent = context, [], 0
        self._before = self._decode(context) if context else ""

    def _text(self) -> str:
        whole = self._decode(self._context + self._pending)
        # Byte-fallback decoders rewrite a run of bytes that turns out invalid; then decode the new tokens alone.
        return whole[len(self._before) :] if whole.startswith(self._before) else self._decode(self._pending)
