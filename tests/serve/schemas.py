"""Fifty JSON schemas: every kind of value, alone and together."""

_NAME = {"type": "string", "maxLength": 8}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 99}
_TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": _COUNT, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


def _object(required=None, **properties):
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _array(items, least=0, most=3, **more):
    return {"type": "array", "items": items, "minItems": least, "maxItems": most, **more}


_VALUES = [
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, 2.5, "three", None, True]},
    {"const": "only this"},
    {"type": "boolean"},
    {"type": "null"},
    _COUNT,
    {"type": "integer", "exclusiveMinimum": -5, "exclusiveMaximum": 5},
    {"type": "integer", "minimum": -1000, "maximum": -990},
    {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 10},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 1.5, "maximum": 2.25},
    _NAME,
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
    {"type": "string", "pattern": "^(yes|no|maybe)$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "email"},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    {"anyOf": [_NAME, _COUNT]},
    {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]},
]
SCHEMAS = [
    *_VALUES,
    _array(_COUNT, 2, 2),
    _array({"enum": ["a", "b"]}),
    _array(_array({"type": "boolean"}, 1, 2), 1, 2),
    {"type": "array", "prefixItems": [_NAME, _COUNT], "items": False, "minItems": 2},
    _array({"type": "string", "format": "date"}, 1, 2),
    _object(name=_NAME, age=_COUNT),
    _object(["name"], name=_NAME, age=_COUNT, city={"enum": ["Paris", "Rome"]}),
    _object([], a=_COUNT, b=_COUNT, c=_COUNT),
    _object(inner=_object(deeper=_object(value={"type": "boolean"}))),
    _object(items=_array(_object(id=_COUNT), 1, 2)),
    _object(when={"type": "string", "format": "date-time"}, where={"type": "string", "format": "ipv4"}),
    _object(code={"type": "string", "pattern": "^[a-f0-9]{6}$"}, ratio={"type": "number", "minimum": 0, "maximum": 1}),
    _object(kind={"const": "circle"}, radius={"type": "integer", "minimum": 1, "maximum": 9}),
    {"anyOf": [_object(kind={"const": "a"}, x=_COUNT), _object(kind={"const": "b"}, y=_NAME)]},
    {"type": "object", "additionalProperties": _COUNT, "properties": {"a": _COUNT}, "required": ["a"]},
    {"type": "object", "properties": {"größe": _COUNT, "日本": _NAME}, "required": ["größe", "日本"]},
    _TREE,
    {"$defs": {"n": _COUNT}, **_object(a={"$ref": "#/$defs/n"}, b=_array({"$ref": "#/$defs/n"}, 1, 2))},
    {"$defs": {"p": _object(x=_COUNT, y=_COUNT)}, **_array({"$ref": "#/$defs/p"}, 1, 2)},
    _object(value={"type": ["string", "null"], "maxLength": 4}, flag={"type": "boolean"}),
    _object(**{f"field_{n}": {"type": "boolean"} for n in range(12)}),
    _object(choice={"enum": [f"option {n}" for n in range(100)]}),
    _object(matrix=_array(_array(_COUNT, 2, 2), 2, 2)),
    {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"], "additionalProperties": False},
    _object(id={"type": "string", "format": "uuid"}, tags=_array(_NAME, 0, 2)),
]
