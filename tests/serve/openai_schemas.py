"""OpenAI's published schemas of the shapes that the server answers with, reduced to those.

`python -m tests.serve.openai_schemas openapi.json` makes openai_schemas.json from the file of that name in the public
repository openai/openai-openapi (MIT licence, © OpenAI): without descriptions, and without the alternatives that no
answer uses, such as outputs of hosted tools.
"""

import json
import sys
from functools import cache
from pathlib import Path

import jsonschema

FILE = Path(__file__).with_suffix(".json")
_REFERENCE = "#/components/schemas/"
_WORDS = ("description", "title", "example", "examples", "default", "deprecated", "discriminator", "nullable")
ANSWERS = (
    *("CreateChatCompletionResponse", "CreateChatCompletionStreamResponse", "CreateCompletionResponse"),
    *("CreateEmbeddingResponse", "ListModelsResponse", "Model", "ErrorResponse", "Response", "ResponseStreamEvent"),
)
# Alternatives that answers use; other alternatives are left out.
_USED = (
    *("ChatCompletionMessageToolCall", "OutputMessage", "FunctionToolCall", "ReasoningItem", "OutputTextContent"),
    *(
        "ReasoningTextContent",
        "FunctionTool",
        "ToolChoiceOptions",
        "ToolChoiceFunction",
        "TextResponseFormatConfiguration",
    ),
    *("TextResponseFormatJsonSchema", "ResponseFormatText", "ResponseFormatJsonObject", "ResponseFormatTextGrammar"),
    *("ResponseError", "ResponseUsage", "Metadata", "Reasoning", "ReasoningEffort", "ResponseCreatedEvent"),
    *("ResponseInProgressEvent", "ResponseCompletedEvent", "ResponseIncompleteEvent", "ResponseOutputItemAddedEvent"),
    *("ResponseOutputItemDoneEvent", "ResponseContentPartAddedEvent", "ResponseContentPartDoneEvent"),
    *("ResponseTextDeltaEvent", "ResponseTextDoneEvent", "ResponseReasoningTextDeltaEvent"),
    *("ResponseReasoningTextDoneEvent", "ResponseFunctionCallArgumentsDeltaEvent", "OutputContent"),
    *("ResponseFunctionCallArgumentsDoneEvent", "ResponseErrorEvent", "ServiceTier", "ModelIdsShared"),
)


@cache
def _validator(name):
    document = json.loads(FILE.read_text("utf-8"))
    return jsonschema.Draft202012Validator({"$ref": _REFERENCE + name, "components": {"schemas": document["schemas"]}})


def check(name, answer):
    """Raises ValidationError if an answer does not match a schema of ANSWERS."""
    _validator(name).validate(answer)


def reduced(schemas):
    """The schemas of ANSWERS and of what they refer to."""
    found, missing = {}, list(ANSWERS)
    while missing:
        name = missing.pop()
        if name not in found:
            found[name] = _without_unused(schemas[name])
            missing += [text.removeprefix(_REFERENCE) for text in _references(found[name])]
    return dict(sorted(found.items()))


def _without_unused(schema):
    if isinstance(schema, list):
        return [_without_unused(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("nullable") is True:  # a word of OpenAPI 3.0, which JSON Schema does not know
        return {"anyOf": [_without_unused({**schema, "nullable": False}), {"type": "null"}]}
    found = {}
    for key, value in schema.items():
        if key == "properties":  # whose keys are names, also that of a property called "description"
            found[key] = {name: _without_unused(each) for name, each in value.items()}
        elif key in ("anyOf", "oneOf"):
            found[key] = _without_unused([each for each in value if _is_used(each)])
        elif key not in _WORDS and not key.startswith("x-"):
            found[key] = _without_unused(value)
    return found


def _is_used(alternative):
    reference = alternative.get("$ref") if isinstance(alternative, dict) else None
    return reference is None or reference.removeprefix(_REFERENCE) in _USED


def _references(schema):
    if isinstance(schema, dict):
        return (
            [schema["$ref"]] if "$ref" in schema else [each for value in schema.values() for each in _references(value)]
        )
    return [each for value in schema for each in _references(value)] if isinstance(schema, list) else []


if __name__ == "__main__":
    published = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    text = {"source": "openai/openai-openapi, MIT licence", "schemas": reduced(published["components"]["schemas"])}
    FILE.write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n", "utf-8")
