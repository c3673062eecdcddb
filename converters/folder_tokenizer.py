"""The tokenizer of a Hugging Face folder: tokenizer.json with the tokens that other files add, and special tokens.

Follows transformers (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`): which file names a
token, which are added to tokenizer.json, and which files are not read beside others. Knows no model.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from rkf.converters.families.keys import flag, optional_flag, read, text
from rkf.converters.input_files import read_bytes, read_json, refuse_pointer
from rkf.errors import SourceError, StructureError, UnsupportedError, naming
from rkf.format.constants import TOKENIZER
from rkf.model.metadata import SpecialToken
from rkf.text.tokenizer_json import around, load, one_line, to_json

SETTINGS, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# Names that every tokenizer may give. Others are names only where their value is a text.
_STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ID = re.compile("[0-9]{1,10}")
# Keys whose objects name further tokens, and whose lists add tokens without a name.
_FURTHER = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")


@dataclass(frozen=True, kw_only=True)
class _AddedKeys:
    """An object that describes a token. The reference takes a special token's text as it stands, by default."""

    content: str = text("")
    special: bool = flag(False, or_null=True)
    lstrip: bool = flag(False, or_null=True)
    rstrip: bool = flag(False, or_null=True)
    single_word: bool = flag(False, or_null=True)
    normalized: bool | None = optional_flag()

    def token(self, special: bool = False) -> AddedToken:
        special = special or self.special
        return AddedToken(
            self.content,
            special=special,
            lstrip=self.lstrip,
            rstrip=self.rstrip,
            single_word=self.single_word,
            normalized=not special if self.normalized is None else self.normalized,
        )


@dataclass(frozen=True, kw_only=True)
class _SettingsKeys:
    split_special_tokens: bool = flag(False, or_null=True)


class FolderTokenizer:
    """The tokenizer of a folder. json: its tokenizer.json. notes: a line for each thing that was left out.
    first_id: the token that it puts before each text.

    rows: those of the embedding. A token past them is left out: the model has no values for it.

    Raises SourceError that names the file and the key.
    """

    def __init__(self, folder: Path, rows: int, label: str) -> None:
        self.notes: list[str] = []
        path = folder / TOKENIZER
        if not path.is_file():
            raise SourceError(
                f"{label}: tokenizer.json is missing; write one with "
                "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        refuse_pointer(path)
        self.json = read_bytes(path)
        self._tokenizer = load_tokenizer(self.json, label)
        self._heed(read_json(folder / SETTINGS, optional=True), folder / SETTINGS)
        named, described, listed = _tokens_of(folder)
        with _as_source(label), one_line(TOKENIZER):
            if self._add(named, described, listed):
                self.json = to_json(self._tokenizer).encode()
        if self._largest() >= rows:
            self._cut(rows, label)
        if (count := self._tokenizer.get_vocab_size(with_added_tokens=True)) > rows:
            raise SourceError(f"{label}: tokenizer.json has {count} tokens for {rows} rows: two of them share an id")
        with _as_source(label), one_line(TOKENIZER):
            before, _ = around(self._tokenizer)
        self.first_id = before[0] if len(before) == 1 else None
        self.special_tokens = {
            name: SpecialToken(token.content, self.id_of(token.content)) for name, token in sorted(named.items())
        }

    def id_of(self, text: str) -> int | None:
        """The id of a token's text; None if the vocabulary does not have it."""
        return self._tokenizer.token_to_id(text)

    def _heed(self, settings: Mapping[str, Any], path: Path) -> None:
        """Refuse or note the settings by which the reference changes what a text's tokens are, or their text."""
        with naming(path):
            if read(_SettingsKeys, settings).split_special_tokens:
                raise UnsupportedError("split_special_tokens: True is not supported; expected false")
        # The reference does not do it to a BPE, whose tokens hold their spaces.
        if settings.get("clean_up_tokenization_spaces") and not isinstance(self._tokenizer.model, models.BPE):
            ignored = "clean_up_tokenization_spaces is ignored: texts keep the spaces of their tokens"
            self.notes.append(f"{SETTINGS}: {ignored}")

    def _add(self, named: Mapping[str, AddedToken], described: _Described, listed: Sequence[AddedToken]) -> bool:
        """Add the tokens that tokenizer.json lacks or has with other options. Those that only have a name or stand in a
        list are added where their text is no token yet. A token with a name is special, and one that was stays so.
        """
        have = list(self._tokenizer.get_added_tokens_decoder().values())
        options, texts = {repr(token) for token in have}, {token.content for token in have}
        special = {token.content for token in (*named.values(), *(each for each in have if each.special))}
        wanted = []
        for token in described.tokens if described.alone else [*described.tokens, *have]:
            token.special = token.special or token.content in special
            texts.add(token.content)
            wanted += [token] if repr(token) not in options else []
        in_order = dict.fromkeys((*_STANDARD, *named))
        for token in (*(named[name] for name in in_order if name in named), *listed):
            wanted += [token] if token.content not in texts else []
            texts.add(token.content)
        return self._tokenizer.add_tokens(wanted) > 0

    def _largest(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def _cut(self, rows: int, label: str) -> None:
        """Leave out the tokens past the rows."""
        tokenizer = json.loads(self.json)
        added = tokenizer.get("added_tokens", [])
        past = [token["content"] for token in added if token["id"] >= rows]
        tokenizer["added_tokens"] = [token for token in added if token["id"] < rows]
        if isinstance(vocab := tokenizer["model"].get("vocab"), dict):
            for token in past:
                vocab.pop(token, None)
        self.json = json.dumps(tokenizer, ensure_ascii=False).encode()
        self._tokenizer = load_tokenizer(self.json, label)
        if (largest := self._largest()) >= rows:
            raise SourceError(f"{label}: tokenizer.json has id {largest}, expected ids below {rows}")
        self.notes.append(f"tokenizer.json: tokens past the {rows} rows of the embedding are left out: {some(past)}")


def some(items: Sequence[object]) -> str:
    """The first of several things, in a line."""
    texts = map(repr, items[:4])
    shown = [each if len(each) <= 80 else f"{each[:80]}…" for each in texts]
    return ", ".join([*shown, *([f"… ({len(items)} in all)"] if len(items) > 4 else [])])


def load_tokenizer(tokenizer_json: bytes, label: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json; SourceError if it is invalid, or out of the bounds of `rkf.text`."""
    with _as_source(label):
        return load(tokenizer_json)


@contextmanager
def _as_source(label: str) -> Iterator[None]:
    """What is damage in an .rkf file is an unusable source here."""
    try:
        yield
    except StructureError as error:
        raise SourceError(f"{label}: {error}") from None


@dataclass(frozen=True, slots=True)
class _Described:
    """Tokens with options, by id. alone: those of tokenizer.json do not count beside them."""

    tokens: list[AddedToken]
    alone: bool


def _tokens_of(folder: Path) -> tuple[dict[str, AddedToken], _Described, list[AddedToken]]:
    """The named tokens, those that are described, and those in lists, from the files beside tokenizer.json.

    The older files special_tokens_map.json and added_tokens.json count only beside a tokenizer_config.json that has no
    added_tokens_decoder; the first of them then comes before it.
    """
    settings = read_json(folder / SETTINGS, optional=True)
    with naming(folder / SETTINGS):
        named = _named(settings)
        listed = _listed(settings)
        decoder = settings.get("added_tokens_decoder")
        if decoder is not None:
            return named, _Described(_decoder(decoder), alone=True), listed
    with naming(folder / SPECIAL_MAP):
        special_map = read_json(folder / SPECIAL_MAP, optional=True)
        named |= _named(special_map)
        listed += _listed(special_map)
    with naming(folder / ADDED):
        special = {token.content for token in (*named.values(), *listed)}
        older = _older(read_json(folder / ADDED, optional=True), special)
    return named, _Described(older, alone=False), listed


def _named(source: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Name -> token."""
    found = {}
    for name, value in source.items():
        if (name in _STANDARD and value is not None) or (name.endswith("_token") and isinstance(value, str)):
            found[name] = _token(name, value)
    for key in _FURTHER:
        if isinstance(source.get(key), dict):
            found |= {name: _token(f"{key}, {name}", value) for name, value in source[key].items()}
    for name in found:
        if not name.isidentifier():
            raise SourceError(f"{reprlib.repr(name)}: expected a name that a template can use")
    return {name: token for name, token in found.items() if token.content}


def _listed(source: Mapping[str, Any]) -> list[AddedToken]:
    """Tokens without a name. The older name of the list counts only without the newer one."""
    lists = {key: source[key] for key in _FURTHER if isinstance(source.get(key), list)}
    if source.get("extra_special_tokens"):
        lists.pop("additional_special_tokens", None)
    return [_token(key, value) for key, values in lists.items() for value in values]


def _decoder(decoder: Any) -> list[AddedToken]:
    """The tokens of added_tokens_decoder, by id."""
    if not isinstance(decoder, dict):
        raise SourceError(f"added_tokens_decoder: expected an object, got {reprlib.repr(decoder)}")
    for index, token in decoder.items():
        if not _ID.fullmatch(index) or not isinstance(token, dict):
            raise SourceError(f"added_tokens_decoder, {index}: expected an id and an object, got {reprlib.repr(token)}")
    return [_token(f"added_tokens_decoder, {index}", decoder[index], False) for index in sorted(decoder, key=int)]


def _older(texts: Mapping[str, Any], special: Collection[str]) -> list[AddedToken]:
    """The tokens of an added_tokens.json, by id."""
    for token, index in texts.items():
        if type(index) is not int:
            raise SourceError(f"{reprlib.repr(token)}: expected a token's id, got {reprlib.repr(index)}")
    return [_token(token, token, token in special) for token in sorted(texts, key=texts.__getitem__)]


def _token(key: str, value: Any, special: bool = True) -> AddedToken:
    """A token in either form: a text, or an object that has it as "content"."""
    if not isinstance(value, str | dict):
        raise SourceError(f"{key}: expected a token, got {reprlib.repr(value)}")
    try:
        return read(_AddedKeys, {"content": value} if isinstance(value, str) else value).token(special)
    except SourceError as error:
        raise SourceError(f"{key}: {error}") from None
