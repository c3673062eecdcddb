"""Which tokens end an answer: one rule for folders and GGUF files. Knows no format.

Those that the checkpoint names, and those whose text ends a turn in some model: checkpoints often name only one of
several. The texts and their exceptions are llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

END_OF_TURN = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
)
# Tokens of fill-in-the-middle that end a text, by the name of the key that a GGUF has for each.
FILL_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}

IdOf = Callable[[str], int | None]


def not_ends(id_of: IdOf) -> set[str]:
    """Texts of END_OF_TURN that end nothing in a vocabulary, because of others in it."""
    found = {"</s>"} if _has(id_of, "<|tool_response>") else set()
    if _has(id_of, "<|call|>", "<|calls|>") and _has(id_of, "<|return|>", "<|flush|>"):
        found.add("<|end|>")
    return found


def ends(named: Iterable[int], id_of: IdOf, filling: Iterable[str] = tuple(FILL_ENDS)) -> tuple[int, ...]:
    """The ids that end an answer: the named ones in their order, then the others by id.

    id_of: a text's id, None if the vocabulary does not have it. filling: the keys of FILL_ENDS to look for.
    """
    first = tuple(dict.fromkeys(named))
    texts = [text for text in END_OF_TURN if text not in not_ends(id_of)]
    texts += [text for key in filling for text in FILL_ENDS[key]]
    found = {index for text in texts if (index := id_of(text)) is not None}
    return first + tuple(sorted(found.difference(first)))


def _has(id_of: IdOf, *texts: str) -> bool:
    return any(id_of(text) is not None for text in texts)
