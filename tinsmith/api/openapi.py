"""The OpenAPI document of this server: every route, what it takes and what it answers, from the types that do the work.

A test compares it with the application's routes, and another sends what it describes and looks at the answers.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import msgspec

from tinsmith import __version__
from tinsmith.api.descriptions import DESCRIBED, JSON, Described

_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_REF = "#/components/schemas/{name}"
_ERRORS = {
    "4XX": "The request is refused; the body says why, and what is allowed.",
    "5XX": "The server cannot answer now (503, with its reason), or failed.",
}


@cache
def document() -> dict[str, Any]:
    """The whole document, in OpenAPI 3.1."""
    schemas = _Schemas()
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), described in DESCRIBED.items():
        place = paths.setdefault(_PARAMETER.sub(r"{\1}", path), {})
        place[method.lower()] = _operation(method, path, described, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tinsmith", "version": __version__},
        "paths": paths,
        "security": [{"key": []}, {"bearer": []}],
        "components": {
            "schemas": schemas.components,
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


class _Schemas:
    """JSON schemas of all types that are described."""

    def __init__(self) -> None:
        kinds = list(dict.fromkeys(kind for described in DESCRIBED.values() for kind in _types(described)))
        found, self.components = msgspec.json.schema_components(kinds, schema_hook=_anything, ref_template=_REF)
        self._by_type = dict(zip(map(repr, kinds), found, strict=True))

    def of(self, kind: Any) -> dict[str, Any]:
        """A reference, or any JSON object for None."""
        return {"type": "object"} if kind is None else self._by_type[repr(kind)]


def _anything(_kind: type) -> dict[str, Any]:
    """The schema of what msgspec knows no schema for: `object`. (An empty one it would take for none.)"""
    return {"description": "Any value."}


def _types(described: Described) -> Iterator[Any]:
    for kind in (described.takes, described.answers, *described.status.values()):
        if kind is not None and kind is not bytes:
            yield kind


def _operation(method: str, path: str, described: Described, schemas: _Schemas) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PARAMETER.findall(path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in described.query.items()
    ]
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"),
        "summary": described.summary,
        "parameters": parameters,
        "responses": _responses(described, schemas),
    }
    if described.takes is not None:
        operation["requestBody"] = {"required": True, "content": _content(described.takes, described.media, schemas)}
    return operation | ({"security": []} if described.is_open else {})


def _responses(described: Described, schemas: _Schemas) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for media in described.answered_as:
        content |= _content(described.answers if media == JSON else bytes, media, schemas)
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": content}}
    for status, kind in described.status.items():
        responses[str(status)] = {"description": "See the body.", "content": _content(kind, JSON, schemas)}
    wrong = {JSON: {"schema": {"type": "object", "minProperties": 1}}}
    return responses | {status: {"description": reason, "content": wrong} for status, reason in _ERRORS.items()}


def _content(kind: Any, media: str, schemas: _Schemas) -> Mapping[str, Any]:
    """Bytes have no schema beyond being some."""
    return {media: {"schema": {} if kind is bytes else schemas.of(kind)}}
