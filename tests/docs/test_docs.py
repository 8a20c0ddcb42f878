"""Protects readers: every setting, command and error is explained, links lead somewhere, both languages keep pace."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT

from nanogpt import errors, settings
from nanogpt.settings import Settings

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("benchmarks/*/README.md")])
PAIRS = [
    (ROOT / "README.md", ROOT / "README.zh-CN.md"),
    *((DOCS / page.name, page) for page in sorted((DOCS / "zh").glob("*.md"))),
]


# The commands of the guide's shell blocks, word for word; those of its Docker chapter are tested with the images.
GUIDES_COMMANDS = (
    "python -m web.serve",
    "MODEL_CHECKPOINT=log/model_40000.pt PORT=8080 python -m web.serve",
    "pip install gunicorn",
    "gunicorn -w 4 -b 0.0.0.0:5000 web.serve:app",
    "gunicorn -w 4 -b 0.0.0.0:5000 --timeout 120 web.serve:app",
    "pip install redis",
    'python -c "import torch; print(torch.cuda.is_available())"',
    "htop",
    "nvidia-smi -l 1",
    "netstat -an | grep 5000",
)
GUIDES_CHAPTERS = (
    "概述", "快速开始", "API 接口", "生产部署", "性能优化", "监控和日志", "安全建议", "故障排查", "部署清单", "相关文档"
)  # fmt: skip


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def headings(page: Path) -> list[tuple[int, str]]:
    return [
        (len(match[1]), match[2])
        for match in re.finditer(r"^(#+) (.+)$", without_code(page.read_text(encoding="utf-8")), re.M)
    ]


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return text.strip().replace(" ", "-")


def links(page: Path) -> Iterator[str]:
    for match in re.finditer(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if not match[1].startswith(("http://", "https://", "mailto:")):
            yield match[1]


def our_errors() -> list[type[errors.NanoGPTError]]:
    importlib.import_module("nanogpt.web")  # all parts of the server may have errors of their own
    found, left = [], [errors.NanoGPTError]
    while left:
        found.append(left.pop())
        left += found[-1].__subclasses__()
    return [error for error in found if error.__module__ != "nanogpt.web.generation"]  # a client that left reads none


def test_generated_pages_are_in_step_with_the_code() -> None:
    result = subprocess.run(
        [sys.executable, "tools/docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_every_setting_is_documented(field: dataclasses.Field[object]) -> None:
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert f"`{field.name}`" in page
    assert f"`{field.metadata['env']}`" in page
    assert field.metadata["help"].replace("|", "\\|") in page


@pytest.mark.parametrize("name", sorted(settings._NOT_SETTINGS))
def test_every_other_variable_is_documented(name: str) -> None:
    assert f"`{name}`" in (DOCS / "settings.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["troubleshooting.md", "zh/troubleshooting.md"])
@pytest.mark.parametrize("error", our_errors(), ids=lambda error: error.__name__)
def test_every_error_has_its_remedy_documented(error: type[errors.NanoGPTError], page: str) -> None:
    row = re.search(rf"^\| `{error.code}` \|.*$", (DOCS / page).read_text(encoding="utf-8"), re.M)
    assert row, f"docs/{page} has no row for the code {error.code}"
    assert f"| {error.status} |" in row[0] or error.exit_code == 2, f"{error.code} has the status {error.status}"
    assert all(cell.strip() for cell in row[0].strip("|").split("|")), "a cell is empty"


def test_messages_that_are_explained_are_ours() -> None:
    """What stands between the dots of a message stands so in the code, or nobody finds the row."""
    english, chinese = (
        re.findall(r"^\| (`[^|]*) \| [^|]+ \| [^|]+ \|$", (DOCS / page).read_text(encoding="utf-8"), re.M)
        for page in ("troubleshooting.md", "zh/troubleshooting.md")
    )
    messages = [re.findall("`([^`]+)`", cell) for cell in english]
    assert messages == [re.findall("`([^`]+)`", cell) for cell in chinese]
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "nanogpt").rglob("*.py")))
    source = re.sub(r'"\n\s+f?"', "", source)  # literals that go on in the next line
    parts = [part.strip(" .:") for row in messages for message in row for part in message.split("…")]
    assert len(parts) > 25
    assert not [part for part in parts if part not in source]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in links(page):
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        known = [anchor(text) for _, text in headings(target)] if target.suffix == ".md" and target.exists() else []
        if not target.exists() or (fragment and fragment not in known):
            wrong.append(link)
    assert not wrong


def test_the_chapters_that_the_doctor_points_to_exist() -> None:
    from nanogpt.doctor import checkpoint, configuration, live, machine, proxy
    from nanogpt.doctor.findings import PAGE

    known = {anchor(text) for _, text in headings(ROOT / PAGE)}
    checks = [check for module in (checkpoint, configuration, live, machine, proxy) for check in module.CHECKS]
    assert {check.anchor for check in checks} <= known


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: str(page.relative_to(DOCS)))
def test_every_page_is_found_from_the_index(page: Path) -> None:
    index = DOCS / "index.md"
    reachable = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)} | {index}
    assert page.resolve() in reachable


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=lambda page: str(page.relative_to(ROOT)))
def test_both_languages_have_the_same_chapters(english: Path, chinese: Path) -> None:
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    assert re.search("[一-鿿]", chinese.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=lambda page: str(page.relative_to(ROOT)))
def test_both_languages_show_the_same_commands(english: Path, chinese: Path) -> None:
    """Programs and JSON as well: what the tests run of an English page, they have run of the Chinese one."""

    def commands(page: Path) -> list[str]:
        blocks = re.findall(r"^ *```(?:bash|python|json)\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.M | re.S)
        # Comments and prompts are in the reader's language.
        lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
        return [re.sub(r"[^\x00-\x7f]+", "", line) for line in lines if line and not line.startswith("#")]

    assert commands(english) == commands(chinese)


@pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=lambda page: str(page.relative_to(ROOT)))
def test_both_languages_have_the_same_rows_in_their_tables(english: Path, chinese: Path) -> None:
    """Names, defaults and limits of a new setting, metric or code come to both: whatever stands as code in a row."""

    def rows(page: Path) -> list[list[str]]:
        text = without_code(page.read_text(encoding="utf-8"))
        return [sorted(re.findall("`([^`]+)`", row)) for row in re.findall(r"^\|.*\|$", text, re.M)]

    assert rows(english) == rows(chinese)


@pytest.mark.parametrize("page", ["deployment.md", "zh/deployment.md"])
def test_the_guides_commands_stand_in_the_deployment_guide(page: str) -> None:
    lines = [line.strip() for line in (DOCS / page).read_text(encoding="utf-8").splitlines()]
    places = [lines.index(command) for command in GUIDES_COMMANDS]
    assert places == sorted(places), "in the guide's order"


def test_the_guides_chapters_stand_in_its_order() -> None:
    ours = [text for level, text in headings(DOCS / "zh" / "deployment.md") if level == 2]
    assert [text for text in ours if text in GUIDES_CHAPTERS] == list(GUIDES_CHAPTERS)


@pytest.mark.parametrize("page", [DOCS / "what-users-ask.md", ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_tests_that_a_page_relies_on_exist(page: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8"))
    assert named
    for path, function in named:
        assert (ROOT / path).is_file(), path
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not function or f"\ndef {function}(" in text, f"{path} has no {function}"


def test_the_readme_names_both_commands() -> None:
    for readme in ("README.md", "README.zh-CN.md"):
        text = (ROOT / readme).read_text(encoding="utf-8")
        assert "make serve" in text
        assert "make test" in text


def test_the_changelog_knows_the_version() -> None:
    from nanogpt._version import __version__

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^\]]+)\]", text, re.M)
    assert versions[0] in ("Unreleased", __version__)
