"""The special tokens of a Hugging Face tokenizer, by the names that chat templates use. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from rkf.model.metadata import SpecialToken

# Objects of tokenizer_config.json whose keys name further tokens.
_FURTHER = ("extra_special_tokens", "model_specific_special_tokens")


def special_tokens(
    settings: Mapping[str, Any], special_map: Mapping[str, Any], tokenizer: Tokenizer
) -> dict[str, SpecialToken]:
    """Name -> text, and id if the vocabulary has the text.

    settings: tokenizer_config.json, which has priority. special_map: special_tokens_map.json.
    """
    found: dict[str, Any] = {}
    for source in (special_map, settings):
        found |= {name: token for name, token in source.items() if name.endswith("_token")}
        for further in _FURTHER:
            if isinstance(source.get(further), dict):
                found |= source[further]
    texts = {name: text for name, token in sorted(found.items()) if (text := token_text(token)) is not None}
    return {name: SpecialToken(text, tokenizer.token_to_id(text)) for name, text in texts.items()}


def token_text(token: Any) -> str | None:
    """The text of a token in either form: a string, or an object that has it as "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None
