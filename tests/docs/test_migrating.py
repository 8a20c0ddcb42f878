"""Protects whoever comes from another program: what the tables promise is there, and what they deny is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import pytest
from support import ROOT
from web_support import make_app

from nanogpt import cli
from nanogpt.settings import Settings
from nanogpt.web.openai.schemas import ChatBody, CompletionBody
from nanogpt.web.schemas import GenerateBody

PAGE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
FIELDS = {*GenerateBody.model_fields, *CompletionBody.model_fields, *ChatBody.model_fields}
VARIABLES = {field.metadata["env"] for field in dataclasses.fields(Settings)}
FLAGS = set(
    re.findall(r"--[\w-]+", "".join(cli.command_parser(name)[0].format_help() for name in ("serve", "generate")))
)
# Names in code that are no flag, variable, route or field: values, commands, and the answer's parts.
WORDS = {"-", "-w", "log/", "default", "fp32", "int8", "int4", "gpt2", "json_schema"}
COMMANDS = {"gunicorn web.serve:app", "nanogpt generate", "nanogpt serve"}


def rows() -> Iterator[tuple[str, str]]:
    """Of each table's rows what it is there, and what it is here."""
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.M):
        head, _, *lines = table.strip().splitlines()
        assert head.split("|")[2].strip().endswith("here"), head
        for line in lines:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            yield cells[0], cells[1]


def test_what_the_tables_promise_is_there() -> None:
    routes = {str(rule) for rule in make_app().url_map.iter_rules()}
    found = 0
    for there, here in rows():
        for name in re.findall(r"`([^`]+)`", here):
            path = name.removeprefix("POST ")
            known = (
                name in FLAGS if name.startswith("--")
                else path in routes if path.startswith("/")
                else name in VARIABLES or name in FIELDS or name in WORDS or name in COMMANDS
            )  # fmt: skip
            assert known, f"{there} is said to be {name} here"
            found += 1
    assert found > 50


def test_fields_that_are_the_same_are_the_same() -> None:
    body = {"vllm": CompletionBody.model_fields, "llama": GenerateBody.model_fields}
    for program, fields in body.items():
        chapter = re.search(rf"^## From {program}.*?(?=^## |\Z)", PAGE, re.M | re.S | re.I)
        assert chapter
        for names in re.findall(r"^\| (`.*`) \| the same \|", chapter[0], re.M):
            for name in re.findall(r"`(\w+)`", names):
                assert name in fields, f"{program}: {name}"


@pytest.mark.parametrize("there", [there for there, here in rows() if "refused by name" in here])
def test_what_is_not_there_is_refused_by_name(there: str) -> None:
    client = make_app().test_client()
    for name in re.findall(r"`(\w+)`", there):
        for path in ("/generate", "/v1/completions"):
            answer = client.post(path, json={"prompt": "a", name: 1})
            assert answer.status_code == 400
            assert name in answer.get_data(as_text=True)
