"""`rkf.load`: a file as a language model that generates text. Joins container, backend, tokenizer and loop."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from operator import index
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from rkf.errors import SemanticsError, UsageError, naming
from rkf.file.container import Container, open_file
from rkf.model.metadata import ModelMetadata
from rkf.runtime.backend import NO_HIDDEN, Row
from rkf.runtime.chooser import Chooser
from rkf.runtime.draft import Draft
from rkf.runtime.embedding import Embedding, Pooling
from rkf.runtime.engine import Engine
from rkf.runtime.generate import Generation, Limits
from rkf.runtime.guide import Form, Guides
from rkf.runtime.recommended import sampling_for
from rkf.text.template import Message
from rkf.text.tokenizer import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from rkf.runtime.backend import Backend
    from rkf.runtime.session import Session

F32 = NDArray[np.float32]
TORCH_DEVICES = {"cpu-torch": "cpu", "cuda": "cuda"}  # name -> torch's name


class Options(TypedDict, total=False):
    """Keywords of every call that generates text; `Model.stream` explains them."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    max_tokens: int | None
    stop: str | Sequence[str]
    form: Form | None
    template_args: Mapping[str, Any]


class Model:
    """A model that is ready to run. It is a context manager; `close` releases the file.

    The last few texts stay in the cache: a call that begins like one of them (the next turn of a chat) computes only
    the new tokens. Generations can run in turn; each computes only when it is iterated. Not thread-safe.
    """

    def __init__(
        self, container: Container, backend: Backend, tokenizer: Tokenizer, draft: Model | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._container, self._backend = container, backend
        self._engine = Engine(backend)
        self._draft_model = draft
        self._draft = None if draft is None else self._draft_of(draft)

    @property
    def config(self) -> ModelMetadata:
        """Its program, `vocab_size`, `context_length`, `bos_id`, `eos_ids` and special tokens."""
        return self._backend.metadata

    @property
    def backend(self) -> Backend:
        """The backend, for measuring it."""
        return self._backend

    @property
    def engine(self) -> Engine:
        """The engine, for many requests at once."""
        return self._engine

    @property
    def draft(self) -> Draft | None:
        """What guesses tokens of its answers, if it was loaded with a draft."""
        return self._draft

    @cached_property
    def guides(self) -> Guides:
        """Guides to answers of a given form."""
        return Guides(self.tokenizer.json, self.config.vocab_size, self.config.eos_ids)

    @cached_property
    def embedding_width(self) -> int:
        """The number of columns of `embed`. UsageError: the model has no hidden states to embed with."""
        program = self.config.program
        if not program.final_norm:
            raise UsageError(NO_HIDDEN)
        return next(weight.shape[1] for weight in program.weights() if weight.name == program.logits.weight)

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        system: str | None = None,
        raw: bool = False,
        **options: Unpack[Options],
    ) -> Generation:
        """Generate an answer, piece by piece: iterate for the text; `.stats` holds counts and times, `.ids` the tokens.

        prompt: a user's message, or a whole conversation ({"role": …, "content": …} each); the model's chat template is
        applied. system: a message before it. raw: continue `prompt` unchanged, which is also done for a model without a
        template. max_tokens: the maximum number of tokens to generate (256; None: up to the model's context length).
        stop: strings that end the text; they are not part of it. form: what the answer must match
        (rkf.runtime.guide.Form). template_args: variables for the chat template, such as enable_thinking.

        temperature … seed: how to choose tokens; rkf.runtime.sampling.Sampling explains them. Without them the options
        that the model's authors recommend, otherwise greedy. seed None: another text each time; `.choose.sampling.seed`
        repeats it.

        UsageError: an option out of range, an empty prompt or one longer than the context, messages that the template
        refuses.
        """
        max_tokens, stop = options.pop("max_tokens", 256), options.pop("stop", ())
        form, template_args = options.pop("form", None), options.pop("template_args", {})
        sampling = sampling_for(self.config, options)
        limits = Limits(max_tokens, self.config.eos_ids, (stop,) if isinstance(stop, str) else tuple(stop))
        ids = self._prompt_ids(prompt, system, raw, template_args)
        guide = None if form is None else self.guides.guide(form)
        context = ids if self._continues(prompt, raw) else ()  # an answer is a separate text, not a continuation
        chooser, text = Chooser(sampling, len(ids), guide), self.tokenizer.stream(context)
        return Generation(self._engine, ids, chooser, limits, text, self._draft)

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        system: str | None = None,
        raw: bool = False,
        **options: Unpack[Options],
    ) -> str:
        """The whole text of `stream`."""
        return "".join(self.stream(prompt, system=system, raw=raw, **options))

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> str:
        """The assistant's answer to a conversation. UsageError: as `stream`, or the model has no chat template."""
        if self.tokenizer.template is None:
            raise UsageError("this model has no chat template: use generate")
        return self.generate(messages, **options)

    def logits(self, ids: Sequence[int]) -> F32:
        """Logits after each of `ids`, from the first: `f32[n, vocab]`."""
        if not 0 < len(ids) <= self.config.context_length:
            raise UsageError(f"ids: expected 1 to {self.config.context_length} of them, got {len(ids)}")
        whole = _whole(ids)
        if min(whole) < 0 or max(whole) >= self.config.vocab_size:
            raise UsageError(f"ids: expected 0 to {self.config.vocab_size - 1}, got {min(whole)} to {max(whole)}")
        tokens = np.array(whole, np.int64)
        return self._backend.forward([Row(self._backend.new_sequence(len(tokens)), tokens)], "all")

    def embed(self, texts: Sequence[str | Sequence[int]], *, pooling: Pooling = "mean") -> F32:
        """Vectors of length 1 for texts or token ids: f32[texts, width].

        pooling: "mean" of the hidden states of all tokens, or that of the "last" one; use the one for which the model
        was trained. UsageError: an empty text, one longer than the context, a model without a norm before its logits.
        """
        if isinstance(texts, str):  # whose characters would be texts
            raise UsageError("texts: expected a list of texts, got one text")
        width = self.embedding_width
        found = [Embedding(self.embedded_ids(text), pooling) for text in texts]
        for each in found:
            self._engine.check(each.request)
        try:
            for each in found:
                self._engine.submit(each.request)
            while not all(each.request.ended for each in found):
                self._engine.step()
        finally:
            for each in found:
                self._engine.cancel(each.request)
        for each in found:
            each.request.take()  # raises its error
        return np.array([each.vector() for each in found], np.float32).reshape(-1, width)

    def text_ids(self, text: str | Sequence[int]) -> list[int]:
        """The ids of a text as it is, BOS before it if the model wants one, or of ids. UsageError: an unknown id."""
        if isinstance(text, str):
            return self.tokenizer.encode(text, enough=self.config.context_length + 1)
        ids = _whole(text)
        if any(not 0 <= token < self.config.vocab_size for token in ids):
            raise UsageError(f"expected token ids below {self.config.vocab_size}, got {ids[:8]}")
        return ids

    def embedded_ids(self, text: str | Sequence[int]) -> list[int]:
        """`text_ids`, with the tokens behind a text that the tokenizer puts there: some models are trained to leave the
        text's vector in them. An empty text stays empty.
        """
        ids = self.text_ids(text)
        wanted = list(self.tokenizer.ending) if isinstance(text, str) and text else []
        return ids if wanted and ids[-len(wanted) :] == wanted else ids + wanted

    def session(self, path: str | PathLike[str]) -> Session:
        """A file that keeps the keys and values of a text: `load` takes a text from it, `save` puts the last one there.

        UsageError: not on this device.
        """
        from rkf.runtime.cpu import CpuBackend  # loads a compiler
        from rkf.runtime.session import Session

        if not isinstance(self._backend, CpuBackend):
            raise UsageError("a session needs the device cpu: omit it")
        return Session(Path(path), self._container, self._backend, self._engine)

    def close(self) -> None:
        """Unmap the file. The model cannot be used afterwards."""
        self._container.close()
        if self._draft_model is not None:
            self._draft_model.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close it. Logits that are not finite are those of this file."""
        self.close()
        if isinstance(error, SemanticsError):
            with naming(self._container.path):
                raise error

    def _draft_of(self, draft: Model) -> Draft:
        """UsageError: another tokenizer, or a model that can take no guesses."""
        path = draft._container.path
        if not self.tokenizer.same_ids(draft.tokenizer):
            raise UsageError(f"draft {path}: expected the tokenizer of {self._container.path}: omit the draft")
        if not self._engine.takes_guesses:
            raise UsageError(
                f"{self._container.path}: a draft needs a model that can take tokens back, and this one has recurrent"
                " states, or ropes that change with a text's length: omit the draft"
            )
        return Draft(draft.backend, self.config.vocab_size)

    def _continues(self, prompt: str | Sequence[Message], raw: bool) -> bool:
        return raw or (self.tokenizer.template is None and isinstance(prompt, str))

    def _prompt_ids(
        self, prompt: str | Sequence[Message], system: str | None, raw: bool, template_args: Mapping[str, Any]
    ) -> list[int]:
        if self._continues(prompt, raw):
            if system is not None:
                raise UsageError("a system message needs the model's chat template: omit it, or put it into the prompt")
            if template_args:
                raise UsageError("template arguments need the model's chat template: omit them")
            if not isinstance(prompt, str):
                raise UsageError("raw: expected one text, got messages")
            return self.text_ids(prompt)
        messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        messages += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.chat_ids(messages, template_args=template_args)

    def chat_ids(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt for a conversation. tools: descriptions of functions that the model may call, for the template."""
        return self.tokenizer.encode_chat(messages, tools=tools, variables=template_args)


def load(
    path: str | PathLike[str],
    *,
    threads: int | None = None,
    exact: bool = False,
    values: str | PathLike[str] | None = None,
    adapter: str | PathLike[str] | None = None,
    device: str = "cpu",
    kv_cache: str | None = None,
    bits: int | None = None,
    draft: str | PathLike[str] | None = None,
    tensor_parallel: bool = False,
) -> Model:
    """Open a `.rkf` file, check its hashes, and make it ready to run.

    threads: default one per core, within affinity and quota. exact: f32 throughout, with the weights of the normative
    decode; otherwise integer products where they are faster. values: a `.rkv` file to use in place of the file's own
    values. adapter: the folder of a PEFT LoRA adapter, applied while the model runs. kv_cache: number format of the
    key/value cache, "int16" (the default), "int16-int8" (keys, values), "int8" or "f32" (the default with exact).
    bits: run a coarser model from the rank planes that fit into this many bits per weight. device: "cpu", or, with the
    torch extra, "cpu-torch" (f32) and "cuda" (bf16), which do not accept `exact`, `kv_cache` or `bits`.
    draft: a smaller model with the same tokenizer that guesses tokens of the answers (draft.py); no text changes by it.
    tensor_parallel: share the model with the other processes that torchrun started, which make the same calls
    (torch_parallel.py); for the torch devices.
    Raises RkfError: not an rkf file, corrupt, unsupported; a values file for other ranks; no torch or no such device.
    """
    if tensor_parallel and draft is not None:  # its use depends on measured times, and processes must do the same
        raise UsageError("tensor parallelism takes no draft: omit it")
    with ExitStack() as opened:
        container = opened.enter_context(open_file(path, values=values))
        if adapter is not None:
            from rkf.converters.adapted_file import adapt  # where a family keeps the modules that an adapter names

            adapt(container, adapter)
        tokenizer = open_tokenizer(container)
        guessing = None
        if draft is not None:
            guessing = opened.enter_context(load(draft, threads=threads, device=device, kv_cache=kv_cache))
        backend = _backend(container, device, threads, exact, kv_cache, bits, tensor_parallel)
        model = Model(container, backend, tokenizer, guessing)
        opened.pop_all()
    return model


def _whole(ids: Sequence[int]) -> list[int]:
    """Token ids as integers; UsageError for what is none, such as a text or 1.5."""
    try:
        return list(map(index, ids))
    except TypeError:
        raise UsageError(f"ids: expected integers, got {reprlib.repr(ids)}") from None


def _backend(
    container: Container,
    device: str,
    threads: int | None,
    exact: bool,
    kv_cache: str | None,
    bits: int | None,
    tensor_parallel: bool,
) -> Backend:
    """The backend for `device`. It is imported only after the file has been checked: it loads a compiler, or torch."""
    if device == "cpu":
        if tensor_parallel:
            raise UsageError(f"device cpu: tensor parallelism needs {' or '.join(TORCH_DEVICES)}")
        from rkf.runtime.cpu import CpuBackend

        return CpuBackend(container, threads=threads, exact=exact, cache_format=kv_cache, bits=bits)
    if device not in TORCH_DEVICES:
        raise UsageError(f"device: expected cpu, {' or '.join(TORCH_DEVICES)}, got {device!r}")
    if exact or kv_cache is not None or bits is not None:
        raise UsageError(f"device {device}: exact, kv_cache and bits are only for cpu: omit them")
    import rkf.torch  # noqa: F401 - reports a missing torch in one line
    from rkf.runtime.torch_backend import TorchBackend

    return TorchBackend(container, TORCH_DEVICES[device], threads=threads, parallel=tensor_parallel)
