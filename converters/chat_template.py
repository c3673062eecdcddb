"""The chat template of a Hugging Face folder, from the place in which the reference looks first."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from rkf.converters.families.keys import is_unicode
from rkf.converters.folder_tokenizer import SETTINGS
from rkf.converters.input_files import read_bytes, read_json
from rkf.errors import SourceError
from rkf.format.constants import CHAT_TEMPLATE

_FURTHER = "additional_chat_templates"
FURTHER_TEMPLATE = f"{_FURTHER}/default.jinja"
PROCESSOR_TEMPLATE = "chat_template.json"  # of models that also read images


def template_of(folder: Path) -> str | None:
    """The template; None if the folder has none. SourceError for one that is no text."""
    for name in (CHAT_TEMPLATE, FURTHER_TEMPLATE):
        if (folder / name).is_file():
            return _own_file(folder / name)
    for name in (SETTINGS, PROCESSOR_TEMPLATE):
        found = _default(read_json(folder / name, optional=True).get("chat_template"))
        if found is not None:
            if not isinstance(found, str) or not is_unicode(found):
                raise SourceError(f"{folder / name}: chat_template: expected a text, got {reprlib.repr(found)}")
            return found
    return None


def other_templates(folder: Path) -> list[str]:
    """The names of the folder's templates for other uses, such as "tool_use", which are not read."""
    found = [path.stem for path in (folder / _FURTHER).glob("*.jinja")]
    if not found and not (folder / CHAT_TEMPLATE).is_file():
        found = [*map(str, _by_name(read_json(folder / SETTINGS, optional=True).get("chat_template")))]
    return sorted(name for name in found if name != "default")


def _own_file(path: Path) -> str:
    """The text of a template's own file, with the line ends of Python's text files."""
    try:
        return read_bytes(path).decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 ({error})") from error


def _default(template: Any) -> Any:
    """The one named "default" of several, in either form."""
    return _by_name(template).get("default") if isinstance(template, dict | list) else template


def _by_name(template: Any) -> dict[Any, Any]:
    """Several templates by name: they are a map, or a list of maps."""
    if isinstance(template, list):
        named = [each for each in template if isinstance(each, dict) and isinstance(each.get("name"), str)]
        return {each["name"]: each.get("template") for each in named}
    return template if isinstance(template, dict) else {}
