"""Calibration of a checkpoint: choosing its text. Joins the tokenizer, the interpreter and kept calibrations.

By default three quarters are pieces of texts of many kinds that come with rkf, and the source model generates the rest,
which covers its own languages and domains. What people write has more rare words than what a model generates, and
serves several times as well (`docs/log.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from rkf.calibrate import kept, passes
from rkf.calibrate.devices import Cpu, Device
from rkf.calibrate.divergences import Coarse
from rkf.calibrate.moments import Moments
from rkf.calibrate.tables import moments_of_tables, of_both
from rkf.errors import UnsupportedError, UsageError
from rkf.file.arrays import MAGIC
from rkf.format.matrix import F32, DenseTensor, to_f32
from rkf.model.metadata import ModelMetadata
from rkf.model.roles import clusterable
from rkf.text.reading import decoded, read_bytes
from rkf.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rkf.converters.source import Source

U32 = NDArray[np.uint32]

# A text from a file: sequences of so many tokens, and so many tokens for each column of the widest matrix, within
# limits. From 2 tokens a column to 8, the error of that matrix' outputs on other text of the kind falls by a sixth.
CTX = 512
_PER_COLUMN, _LEAST, _MOST = 8, 1 << 14, 1 << 17
# The default text.
WRITTEN, WRITTEN_CTX = 128, 128
_GIVEN = 96  # at most so many of them are pieces of rkf's texts
# Every other text drops its first tokens and gets as many more at its end: it starts mid-text, as user prompts often
# do. The first token causes massive activations, and it should not always be BOS.
_LOST = WRITTEN_CTX // 4
_CPU = Cpu()
SHORT = Path(__file__).with_name("short.txt")  # 1,300 to 2,000 tokens of many kinds, for conversions in seconds
_VARIED = Path(__file__).with_name("varied.txt")  # 11,000 to 17,000 more
# Half of the generated texts start with BOS alone, a quarter as an answer to one of these questions in a chat, and a
# quarter with one of these beginnings.
_QUESTIONS = (
    "Who was the most important scientist of the last century, and why?",
    "Write a short story about a lighthouse.",
    "Explain how a bicycle stays upright.",
    "Write a Python function that merges two sorted lists.",
    "What happened in Europe in 1848?",
    "Summarise the rules of football.",
    "How do I cook rice?",
    "Translate 'good morning' into five languages.",
)
_BEGINNINGS = ("The", "In 19", "It was", "= ", "# ", "def ", "According to", "1. ")


@dataclass(frozen=True, slots=True)
class Calibration:
    """tokens: u32[sequences, ctx] for one checkpoint; origin: "self", or a file's name; measured: losses, if known;
    place: where to keep them; notes: lines for the user; device: where the passes run.
    """

    source: Source
    tokens: U32
    origin: str
    measured: Mapping[str, float] | None = None
    place: Path | None = None
    notes: tuple[str, ...] = ()
    device: Device = _CPU

    def of(self, source: Source) -> Calibration:
        """The same text, and losses, for another form of the same model."""
        return replace(self, source=source)

    @property
    def provenance(self) -> dict[str, Any]:
        digest = blake3(self.tokens.astype("<u4").tobytes()).hexdigest()
        return _provenance(self.origin, self.tokens.shape, digest, self.device)

    def moments(self) -> Iterator[Mapping[str, Moments]]:
        return self.device.moments(self.source.model.program, _reader(self.source), self.tokens)

    def metrics(self) -> Iterator[Mapping[str, Moments]]:
        """What errors of rows are weighed with, tables first, then layer by layer: second moments of inputs; for tables
        `rkf.calibrate.tables`, measured on the CPU with any device; for one that is the head too, both.
        """
        program, reader = self.source.model.program, _reader(self.source)
        of_tables, head = moments_of_tables(program, reader, self.tokens), program.logits.weight
        shared = next((name for name in of_tables if reader.stored(name) == reader.stored(head)), None)
        yield {name: each for name, each in of_tables.items() if name != shared}
        for found in self.moments():
            if shared is None or head not in found:
                yield found
            else:
                yield {**found, head: of_both(cast(F32, found[head]), of_tables[shared])}

    def losses(self, coarse: Coarse) -> Mapping[str, float]:
        """Known losses, otherwise those measured with `coarse` (`rkf.calibrate.sensitivity`), which are then kept."""
        if self.measured:
            return self.measured
        found = self.device.losses(self.source.model.program, _reader(self.source), coarse, self.tokens)
        if self.place is not None:
            self.source.refuse_changed()
            kept.keep(self.place, self.kept(found))
        return found

    def kept(self, losses: Mapping[str, float]) -> kept.KeptCalibration:
        """The calibration as it is written to a file."""
        return kept.KeptCalibration(self.tokens, losses, self.source.fingerprint, _tokenizer(self.source))

    @property
    def frequent(self) -> NDArray[np.int64]:
        """All tokens of the vocabulary, from the most frequent of the text."""
        counts = np.bincount(self.tokens.reshape(-1), minlength=self.source.model.vocab_size)
        return np.argsort(-counts, kind="stable")


@dataclass(frozen=True, slots=True)
class Calibrate:
    """Makes a Calibration from text that the model generates, from a text file, or from a file of `rkf.calibrate.kept`.

    progress: of the generation: (tokens done, tokens in all) of a sequence. store: a folder that keeps generated
    tokens, and losses, for the next conversion of the same source; None keeps nothing. device: where the passes run.
    """

    text: Path | None = None
    progress: Callable[[int, int], None] | None = None
    store: Path | None = None
    device: Device = _CPU

    def announced(self, source: Source) -> dict[str, Any]:
        """The final provenance without the hash, if the text is long enough."""
        if self.text is None:
            return _provenance("self", (WRITTEN, WRITTEN_CTX), "0" * 64, self.device)
        return _provenance(self.text.name, (_sequences(source), _ctx(source)), "0" * 64, self.device)

    def __call__(self, source: Source, folder: Path | None = None) -> Calibration:
        """folder: for a temporary file of the source's size in 8 bits; the system's own by default.

        Raises UsageError for a text that is not UTF-8 or shorter than one sequence, OutputError if the disk is full.
        """
        return replace(self._made(source, folder), device=self.device)

    def _made(self, source: Source, folder: Path | None) -> Calibration:
        if self.text is None:
            place = self._place(source, self.announced(source) | {"given": blake3(_texts().encode()).hexdigest()})
            if (found := _kept(source, place, "self")) is not None:
                return found
            made = replace(self_written(source, folder, self.progress, self.device), place=place)
            if place is not None:
                source.refuse_changed()
                kept.keep(place, made.kept({}))
            return made
        with self.text.open("rb") as file:
            data = read_bytes(file, str(self.text))
        if data.startswith(MAGIC):
            return _loaded(data, self.text, source)
        tokens = _cut(data, self.text, source)
        made = Calibration(
            source, tokens, self.text.name, notes=_of_length(self.text, tokens, source), device=self.device
        )
        place = self._place(source, made.provenance)
        found = _kept(source, place, made.origin) or made
        return replace(found, place=place, notes=made.notes)

    def _place(self, source: Source, text: Mapping[str, Any]) -> Path | None:
        return None if self.store is None else kept.place(self.store, source.fingerprint, text)


def self_written(
    source: Source,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    device: Device = _CPU,
) -> Calibration:
    """WRITTEN texts of WRITTEN_CTX tokens: most are pieces of rkf's texts, and the model generates the rest.
    The same weights give the same texts.
    """
    ctx = min(WRITTEN_CTX + _LOST, source.model.context_length)
    lost = min(_LOST, ctx // 5)  # of a short context too, something is left
    tokenizer = Tokenizer(source.tokenizer_json, source.model, source.chat_template)
    beginnings, notes = prompts(source.model, tokenizer)
    given = _given(tokenizer, source.model.vocab_size, beginnings[0][0], ctx - lost)
    begun = [beginnings[number % len(beginnings)] for number in range(WRITTEN - len(given))]
    folder = folder or Path(gettempdir())
    text = device.write_text(source.model.program, _reader(source), begun, ctx=ctx, folder=folder, progress=progress)
    text[1::2, : ctx - lost] = text[1::2, lost:]
    return Calibration(source, np.concatenate([given, text[:, : ctx - lost]]), "self", notes=notes)


def _texts() -> str:
    """rkf's texts."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (SHORT, _VARIED))


def _given(tokenizer: Tokenizer, vocab_size: int, start: int, ctx: int) -> U32:
    """Pieces of rkf's texts, u32[pieces, ctx]; every other one begins with the token `start`."""
    ids = [token for token in tokenizer.encode(_texts(), bos=False) if token < vocab_size]
    pieces = np.array(ids[: len(ids) // ctx * ctx], np.uint32).reshape(-1, ctx)
    chosen = pieces[np.linspace(0, len(pieces) - 1, min(len(pieces), _GIVEN)).astype(int)]
    chosen[::2, 0] = start
    return chosen


def prompts(model: ModelMetadata, tokenizer: Tokenizer) -> tuple[list[list[int]], tuple[str, ...]]:
    """The beginning of each text, and a note if the model's template does not take a question alone."""
    start = [] if model.bos_id is None else [model.bos_id]
    start = start or list(model.eos_ids[:1]) or [0]
    plain = [start + tokenizer.encode(text, bos=False) for text in _BEGINNINGS]
    chats, notes = plain, list[str]()
    if tokenizer.template is not None:
        try:
            chats = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in _QUESTIONS]
        except (UsageError, UnsupportedError) as error:
            notes.append(f"the calibration text has no conversations: {error}")
    return [start] * (len(chats) + len(plain)) + chats + plain, tuple(notes)


def _cut(data: bytes, path: Path, source: Source) -> U32:
    """Sequences of a text's tokens, evenly spread over it."""
    ids = Tokenizer(source.tokenizer_json, source.model).encode(decoded(data, str(path)))
    ctx = _ctx(source)
    available, wanted = len(ids) // ctx, _sequences(source)
    if not available:
        raise UsageError(f"{path}: {len(ids)} tokens; expected at least {ctx}, better {wanted * ctx}")
    chosen = np.unique(np.linspace(0, available - 1, wanted).astype(int))
    return np.array([ids[i * ctx : (i + 1) * ctx] for i in chosen], np.uint32)


def _ctx(source: Source) -> int:
    """The tokens of a sequence of a text from a file."""
    return min(CTX, source.model.context_length)


def _sequences(source: Source) -> int:
    """How many sequences of a long text from a file are used."""
    matrices = set(clusterable(source.model.program)) & source.tensors.keys()
    widest = max((source.tensors[name].shape[-1] for name in matrices), default=0)
    return min(max(_PER_COLUMN * widest, _LEAST), _MOST) // _ctx(source)


def _of_length(path: Path, tokens: U32, source: Source) -> tuple[str, ...]:
    """A note if more of a user's text would have been used."""
    wanted = _sequences(source) * tokens.shape[1]
    if path == SHORT or tokens.size >= wanted:
        return ()
    return (f"{path}: {tokens.size:,} tokens; more text of the kind, up to {wanted:,}, makes a better file",)


def _loaded(data: bytes, path: Path, source: Source) -> Calibration:
    try:
        found = kept.parse(data)
    except ValueError as error:
        raise UsageError(f"{path}: not a calibration written by `rkf calibrate`: {error}") from error
    if not _fits(source, found) or found.tokenizer != _tokenizer(source):
        raise UsageError(f"{path}: written for another model")
    notes = () if found.weights == source.fingerprint else (f"{path}: measured on other weights than these",)
    return Calibration(source, found.tokens, path.name, found.losses, notes=notes)


def _kept(source: Source, place: Path | None, origin: str) -> Calibration | None:
    """The calibration at a place, if there is one for this source."""
    found = None if place is None else kept.found(place)
    return Calibration(source, found.tokens, origin, found.losses, place) if found and _fits(source, found) else None


def _fits(source: Source, found: kept.KeptCalibration) -> bool:
    """Whether tokens and losses may be this source's."""
    matrices = set(clusterable(source.model.program)) & source.tensors.keys()
    within = found.tokens.shape[1] <= source.model.context_length and found.tokens.max() < source.model.vocab_size
    return bool(within) and set(found.losses) in (set(), matrices)


def _tokenizer(source: Source) -> str:
    return blake3(source.tokenizer_json).hexdigest()


@dataclass(frozen=True, slots=True)
class _StoredRows:
    """A table in the form in which its source stores it."""

    tensor: DenseTensor

    def __len__(self) -> int:
        return len(self.tensor.data)

    def __getitem__(self, ids: NDArray[np.integer]) -> F32:
        """f32[ids' shape, cols]"""
        return to_f32(self.tensor.data[ids], self.tensor.dtype)


def _reader(source: Source) -> passes.TensorReader:
    def read(name: str) -> F32:
        return source.read(name).decode()

    def table(name: str) -> _StoredRows:
        return _StoredRows(source.read(name))

    return passes.TensorReader(read, source.aliases, table)


def _provenance(origin: str, shape: tuple[int, ...], digest: str, device: Device) -> dict[str, Any]:
    found = {"ctx": shape[1], "origin": origin, "sequences": shape[0], "tokens_blake3": digest}
    return found if device.name == _CPU.name else found | {"device": device.name}
