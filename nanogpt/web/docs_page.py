"""The API's description as one page to read: made from the OpenAPI document alone, without a script or a request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --soft: #60666d; --line: #dcdfe3; --back: #fff; --panel: #f4f6f8;
  --get: #1264a3; --post: #1a7f45 }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8ea; --soft: #9aa2aa; --line: #33383d; --back: #15181b;
  --panel: #1e2226; --get: #6db5ee; --post: #63c98a } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, sans-serif }
h1 { margin: 0 0 .25rem; font-size: 1.7rem } h2 { margin: 0; font-size: 1.1rem; overflow-wrap: anywhere }
h3 { margin: 1.25rem 0 .5rem; font-size: .95rem }
p { margin: .5rem 0 } a { color: inherit } .soft { color: var(--soft) }
nav ul { margin: 1rem 0 2rem; padding: 0; list-style: none; display: grid; gap: .3rem .8rem;
  grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)) }
section { border-top: 1px solid var(--line); padding: 1.5rem 0 }
code, pre { font: .875em/1.5 ui-monospace, monospace }
pre { background: var(--panel); border-radius: .4rem; padding: .75rem 1rem; overflow-x: auto }
.method { font-weight: 700; color: var(--get) } .POST { color: var(--post) }
table { border-collapse: collapse; width: 100%; font-size: .9rem } .scroll { overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 500 } td:first-child { white-space: nowrap }
summary { cursor: pointer; margin: 1rem 0 .25rem; font-weight: 600; font-size: .95rem }
"""

POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def docs_page(document: dict[str, Any]) -> str:
    info, schemas = document["info"], document["components"]["schemas"]
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style></head><body>",
        f'<header><h1>{escape(info["title"])} <span class="soft">{escape(info["version"])}</span></h1>',
        f"<p>{escape(info['description'])} It stands in <code>X-API-Key</code>, or in ",
        "<code>Authorization: Bearer</code>.",
        ' The same for programs: <a href="openapi.json">openapi.json</a>.</p></header>',
        "<main><nav><ul>",
        *(f'<li><a href="#{operation["operationId"]}">{_title(name)}</a></li>' for name, operation in operations),
        "</ul></nav>",
    ]
    for name, operation in operations:
        parts.append(f'<section id="{operation["operationId"]}"><h2>{_title(name)}</h2>')
        parts.append(f"<p>{escape(operation['summary'])}</p>")
        parts += _body(name.partition(" ")[2], operation, schemas)
        parts += _responses(operation, schemas)
        parts.append("</section>")
    return "".join([*parts, "</main></body></html>\n"])


def _title(name: str) -> str:
    method, _, path = name.partition(" ")
    return f'<span class="method {method}">{method}</span> <code>{escape(path)}</code>'


def _body(path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> Iterator[str]:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return
    if "example" in content:
        data = json.dumps(content["example"], ensure_ascii=False)
        command = f"curl localhost:5000{path} -H 'Content-Type: application/json' -d '{data}'"
        yield f"<pre><code>{escape(command)}</code></pre>"
    yield "<h3>Fields</h3>"
    yield from _table(_resolve(content["schema"], schemas), schemas, asked=True)


def _responses(operation: dict[str, Any], schemas: dict[str, Any]) -> Iterator[str]:
    answer = operation["responses"]["200"]["content"]
    schema = next(iter(answer.values())).get("schema")
    if schema is not None:
        yield "<details><summary>Answer</summary>"
        if stream := answer.get("text/event-stream"):
            yield f"<p>{escape(stream['schema']['description'])}</p>"
        yield from _table(_resolve(schema, schemas), schemas)
        yield "</details>"
    others = [(status, said["description"]) for status, said in operation["responses"].items() if status != "200"]
    if others:
        rows = "".join(f"<tr><td>{status}</td><td>{escape(text)}</td></tr>" for status, text in others)
        yield f'<details><summary>Refusals</summary><div class="scroll"><table>{rows}</table></div></details>'


def _table(schema: dict[str, Any], schemas: dict[str, Any], *, asked: bool = False) -> Iterator[str]:
    """The fields of an answer; or, where they are ``asked`` for, with their defaults, those first that have none."""
    yield f'<div class="scroll"><table><tr><th>field</th><th>type</th>{"<th>default</th>" if asked else ""}'
    yield "<th>meaning</th></tr>"
    required = schema.get("required", ())
    rows = list(_rows(schema, schemas, ""))
    if asked:
        rows.sort(key=lambda row: re.split(r"[.\[]", row[0])[0] not in required)
    for name, value in rows:
        cells = [f"<code>{escape(name)}</code>", escape(_type(value, schemas))]
        if asked:
            default = json.dumps(value["default"]) if value.get("default") is not None else ""
            cells.append("required" if name in required else escape(default))
        cells.append(escape(value.get("description", "")))
        yield f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    yield "</table></div>"


def _rows(schema: dict[str, Any], schemas: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The fields, and below each one those of the object that it is, or is a list of."""
    for name, value in schema.get("properties", {}).items():
        yield prefix + name, value
        for inner in (value, *value.get("anyOf", ())):
            mark = "[]" if inner.get("type") == "array" else ""
            target = _resolve(inner.get("items", inner), schemas)
            if "properties" in target and target is not inner:
                yield from _rows(target, schemas, f"{prefix}{name}{mark}.")


def _type(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """In the words in which a refusal would say it."""
    schema = {**_resolve(schema, schemas), **{k: v for k, v in schema.items() if k != "$ref"}}
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(_type(member, schemas) for member in schema[union]))
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"])
    kind: str = schema.get("type", "any value")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}), schemas)}"
    name = {"string": "text", "boolean": "true or false", "null": "null"}.get(kind, kind)
    low = _number(schema.get("minimum", schema.get("minLength")))
    high = _number(schema.get("maximum", schema.get("maxLength")))
    if low and high:
        return f"{name}, {low} to {high}"
    return f"{name}, from {low}" if low else f"{name}, up to {high}" if high else name


def _number(value: float | None) -> str:
    return "" if value is None else str(int(value) if value == int(value) else value)


def _resolve(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    reference: str = schema.get("$ref", "")
    found: dict[str, Any] = schemas[reference.rpartition("/")[2]] if reference else schema
    return found
