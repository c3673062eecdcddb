"""A fuzz target for each reader of foreign bytes: whatever they are, it raises an RkfError or nothing."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from rkf.calibrate import kept
from rkf.calibrate.calibration import Calibrate
from rkf.cluster.recipe import Recipe
from rkf.commands.chat_turns import read_conversation
from rkf.converters.adapter import AdaptedSource, Adapter
from rkf.converters.shards import INDEX, SINGLE, tensors_of
from rkf.converters.source import open_source
from rkf.errors import RkfError
from rkf.eval import choices, reference
from rkf.file import kept_json
from rkf.file.arrays import packed_arrays
from rkf.file.container import open_file
from rkf.file.verify import verify
from rkf.runtime.engine import Engine, Request
from rkf.runtime.session import Session
from rkf.study import records
from rkf.text.reading import read_text
from rkf.text.tokenizer import Tokenizer
from tests.fuzz import seeds
from tests.fuzz.mutate import Choices, damaged_bytes, damaged_json
from tests.hostile.mutations import damaged

Target = Callable[[Path, bytes], None]  # an empty folder of its own, and the bytes that decide the damage


def container(folder: Path, data: bytes) -> None:
    """rkf and values files: damage behind right hashes, or any bytes."""
    draw, path = Choices(data), folder / "m.rkf"
    sources = seeds.vectors()
    path.write_bytes(damaged(sources[draw(len(sources))], draw) if draw(4) else draw.rest())
    with suppress(RkfError):
        verify(path)


def gguf(folder: Path, data: bytes) -> None:
    """The header of a GGUF file, its fields and its tokenizer."""
    draw, path, sound = Choices(data), folder / "m.gguf", seeds.gguf()
    head = sound.index(b"token_embd.weight")  # damage lies in the header, the tensors' directory follows this name
    path.write_bytes(damaged_bytes(sound[: head + 1200], draw) + sound[head + 1200 :])
    with suppress(RkfError):
        open_source(path)


def safetensors(folder: Path, data: bytes) -> None:
    """The header of a safetensors file: its JSON changed, or its bytes."""
    draw, path, sound = Choices(data), folder / "model.safetensors", seeds.checkpoint()["model.safetensors"]
    path.write_bytes(_damaged_safetensors(sound, draw))
    with suppress(RkfError):
        tensors_of(path)


def _damaged_safetensors(sound: bytes, draw: Choices) -> bytes:
    end = 8 + int.from_bytes(sound[:8], "little")
    if not draw(2):
        return damaged_bytes(sound[:end], draw) + sound[end:]
    text = json.dumps(damaged_json(json.loads(sound[8:end]), draw)).encode()
    return len(text).to_bytes(8, "little") + text + sound[end:]


def _checkpoint(name: str, value: Any = None) -> Target:
    """A JSON file of a checkpoint. value: what it says, if the tiny checkpoint's own says too little."""

    def target(folder: Path, data: bytes) -> None:
        draw, sound = Choices(data), json.dumps(value).encode() if value else seeds.checkpoint()[name]
        changed = json.dumps(damaged_json(json.loads(sound), draw)).encode() if draw(8) else damaged_bytes(sound, draw)
        (seeds.write_checkpoint(folder / "hf") / name).write_bytes(changed)
        with suppress(RkfError):
            open_source(folder / "hf")

    return target


def index(folder: Path, data: bytes) -> None:
    """The index of a checkpoint in two files."""
    draw, hf = Choices(data), seeds.write_checkpoint(folder / "hf")
    (hf / SINGLE).unlink()
    for name, sound in seeds.sharded().items():
        (hf / name).write_bytes(sound)
    found = json.loads(seeds.sharded()[INDEX])
    (hf / INDEX).write_text(json.dumps(damaged_json(found, draw)), encoding="utf-8")
    with suppress(RkfError):
        open_source(hf)


def _write_damaged(folder: Path, files: dict[str, bytes], config: str, draw: Choices) -> None:
    """The files, with damage to the JSON named or to the header of the tensors."""
    for name, sound in files.items():
        (folder / name).write_bytes(sound)
    if draw(2):
        (folder / config).write_text(json.dumps(damaged_json(json.loads(files[config]), draw)), encoding="utf-8")
    else:
        weights = next(name for name in files if name.endswith(".safetensors"))
        (folder / weights).write_bytes(_damaged_safetensors(files[weights], draw))


def adapter(folder: Path, data: bytes) -> None:
    """A LoRA adapter, and its product with the weights."""
    draw = Choices(data)
    _write_damaged(folder, seeds.adapter(), "adapter_config.json", draw)
    source = open_source(seeds.write_checkpoint(seeds.FOLDER / "hf"))
    with suppress(RkfError):
        AdaptedSource(source, Adapter(folder)).read("model.layers.0.self_attn.q_proj.weight")


def restored(folder: Path, data: bytes) -> None:
    """A folder of `rkf export transformers`: what is written from it is sound."""
    from rkf.bridges.transformers_restore import restore

    draw, out = Choices(data), folder / "out.rkf"
    _write_damaged(folder, seeds.exported(), "config.json", draw)
    with suppress(RkfError):
        restore(folder, out)
    if out.exists():
        open_file(out).close()


def questions(folder: Path, data: bytes) -> None:
    """The questions of `rkf eval choices`."""
    draw = Choices(data)
    sound = {"context": "The sky is", "endings": [" blue", " green"], "label": 0}
    changed = (
        json.dumps(damaged_json(sound, draw)).encode() if draw(4) else damaged_bytes(json.dumps(sound).encode(), draw)
    )
    (folder / "questions.jsonl").write_bytes(changed)
    with suppress(RkfError):
        choices.parse(read_text(folder / "questions.jsonl"), "questions.jsonl")


def recipe(folder: Path, data: bytes) -> None:
    """Recipes, and the rules that they give."""
    draw, path = Choices(data), folder / "recipe.toml"
    path.write_bytes(damaged_bytes(seeds.RECIPE.encode(), draw))
    source = open_source(seeds.FOLDER / "hf") if seeds.rkf_file() else None
    with suppress(RkfError):
        found = Recipe.load(path, source.model.program, None)
        for name, spec in source.tensors.items():
            found.rule(name, spec.shape)


def kept_arrays(folder: Path, data: bytes) -> None:
    """Calibrations and references: arrays changed behind a right hash, or bytes of the zip."""
    draw, path = Choices(data), folder / "kept"
    kind, sound = ((kept.KIND, seeds.kept_calibration), ("reference 1", seeds.kept_reference))[draw(2)]
    path.write_bytes(_damaged_arrays(kind, sound(), draw) if draw(3) else damaged_bytes(sound(), draw))
    with suppress(RkfError):
        if kind == "reference 1":
            reference.read(path)
        else:
            seeds.rkf_file()
            Calibrate(path)(open_source(seeds.FOLDER / "hf"))


def _damaged_arrays(kind: str, sound: bytes, draw: Choices) -> bytes:
    """One array in another dtype, of another shape, with odd numbers, or gone; the hash is made again."""
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        arrays = {name[:-4]: np.load(io.BytesIO(archive.read(name))) for name in archive.namelist()}
    del arrays["kept"]
    name = sorted(arrays)[draw(len(arrays))]
    match draw(4):
        case 0:
            arrays[name] = np.ones(arrays[name].shape, ("U4", "u4", "f4", "f8", "i8", "?", "c8", "S4")[draw(8)])
        case 1:
            arrays[name] = np.resize(arrays[name], [draw(4) for _ in range(draw(4))])
        case 2 if arrays[name].dtype.kind == "f" and arrays[name].size:
            arrays[name].flat[draw(arrays[name].size)] = (np.nan, np.inf, -1.0, 1e30)[draw(4)]
        case 2 if arrays[name].dtype.kind == "u" and arrays[name].size:
            most = np.iinfo(arrays[name].dtype).max
            arrays[name].flat[draw(arrays[name].size)] = min((0, seeds.VOCAB, (1 << 32) - 1)[draw(3)], most)
        case _:
            del arrays[name]
    return bytes(packed_arrays(kind, arrays))


def results(folder: Path, data: bytes) -> None:
    """The results of a study: values changed behind a right hash, or bytes."""
    draw = Choices(data)
    sound = {"fingerprint": "0", "study": "drift", "trials": [{"trial": "a", "kld": 0.5}, {"trial": "b", "kld": 1}]}
    if draw(2):
        changed = damaged_json(sound, draw)
        content = kept_json.sealed(records.KIND, changed) if isinstance(changed, dict) else json.dumps(changed).encode()
    else:
        content = damaged_bytes(kept_json.sealed(records.KIND, sound), draw)
    (folder / records.RESULTS).write_bytes(content)
    with suppress(RkfError):
        records.Records(folder, {"fingerprint": "0"})


def session(folder: Path, data: bytes) -> None:
    """A session of a model with windows, or with states: arrays changed behind a right hash, or bytes of the file."""
    draw, path = Choices(data), folder / "session"
    container, backend, sound = seeds.session(("program-recurrent.rkf", "program-windows.rkf")[draw(2)])
    path.write_bytes(_damaged_arrays("session 1", sound, draw) if draw(3) else damaged_bytes(sound, draw))
    engine = Engine(backend)
    with suppress(RkfError):
        Session(path, container, backend, engine).load()
        request = Request([1, 2, 3, 1], lambda logits, ids: int(logits.argmax()), most=7)
        engine.submit(request)
        while not request.ended:
            engine.step()
            request.take()


def conversation(folder: Path, data: bytes) -> None:
    """A conversation that `rkf chat` saved: values changed, or bytes."""
    draw, path = Choices(data), folder / "conversation.json"
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": ""}]
    sound = {"rkf_conversation": 1, "messages": turns}
    changed = (
        json.dumps(damaged_json(sound, draw)).encode() if draw(2) else damaged_bytes(json.dumps(sound).encode(), draw)
    )
    path.write_bytes(changed)
    with suppress(RkfError):
        found = read_conversation(path)
        found.save(path, force=True)
        assert read_conversation(path).turns == found.turns


def text(folder: Path, data: bytes) -> None:
    """A tokenizer.json that runs: texts, a conversation and tokens."""
    draw = Choices(data)
    changed = json.dumps(damaged_json(seeds.small_tokenizer(draw), draw)).encode()
    model = seeds.model()
    chat = [{"role": "user", "content": "a <|s|> b"}]
    with suppress(RkfError):
        made = Tokenizer(changed, model, "<|s|>{{ messages[0].content }}<|s|>")
        ids = made.encode("Ab a b1 \u2581é<|s|>\n" * 3)
        stream = made.stream()
        stream = made.stream()
        for token in ids:
            stream.push(token)
        stream.finish()
        made.encode("a <|s|> b", special=False)
        made.decode([*ids, 0, 399, 1 << 31], special=True)
        made.encode_chat(chat)


TARGETS: dict[str, Target] = {
    "container": container,
    "gguf": gguf,
    "safetensors": safetensors,
    "config": _checkpoint("config.json"),
    "tokenizer": _checkpoint("tokenizer.json"),
    "tokenizer_config": _checkpoint("tokenizer_config.json"),
    "generation_config": _checkpoint("generation_config.json"),
    "special_tokens_map": _checkpoint("special_tokens_map.json"),
    "text": text,
    "added_tokens": _checkpoint("added_tokens.json", seeds.ADDED),
    "added_decoder": _checkpoint("tokenizer_config.json", seeds.ALL_SETTINGS),
    "index": index,
    "adapter": adapter,
    "restored": restored,
    "questions": questions,
    "recipe": recipe,
    "kept_arrays": kept_arrays,
    "results": results,
    "session": session,
    "conversation": conversation,
}
