"""What MkDocs is told beside mkdocs.yml: pages that lie outside docs/, links to them, and the language of each page.

Runs inside `mkdocs build` only (`make site`). It changes no file: what it adds exists in the built site alone.
"""

from __future__ import annotations

import re
from copy import copy
from html import escape, unescape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

# Files of the repository's root that are pages of the site, under these names.
ROOT_PAGES = {"SECURITY.md": "security.md", "CHANGELOG.md": "changelog.md"}
_TABLE, _ROW = re.compile("<table>.*?</table>", re.S), re.compile("<tr>.*?</tr>", re.S)
_HEAD = re.compile("<th[^>]*>(.*?)</th>", re.S)
_LONG_NAME = re.compile("<code>[^<]{32,}</code>")
_LINK_OUT = re.compile(r"\]\((?:\.\./)+(" + "|".join(map(re.escape, ROOT_PAGES)) + r")((?:#[^)\s]*)?)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The root's pages join; their links are written as if they lay in docs/."""
    root = Path(config.config_file_path).parent
    for source, name in ROOT_PAGES.items():
        text = (root / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """A link that leaves docs/ for one of the root's pages leads to where that page is in the site."""
    up = "../" * page.file.src_uri.count("/")
    return _LINK_OUT.sub(lambda match: f"]({up}{ROOT_PAGES[match[1]]}{match[2]})", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Each cell knows its column's name: on a phone a row is shown as a card (theme/stylesheets/site.css)."""
    return _TABLE.sub(lambda table: _LONG_NAME.sub(_breakable, _label_cells(table)), html)


def _breakable(code: re.Match[str]) -> str:
    """A long name may break behind its joints, and nowhere else."""
    return re.sub(r"(/|::|_(?=\w))", r"\1<wbr>", code[0].removesuffix("</code>")) + "</code>"


def _label_cells(table: re.Match[str]) -> str:
    names = [escape(unescape(re.sub("<[^>]+>", "", name)), quote=True) for name in _HEAD.findall(table[0])]

    def label_row(row: re.Match[str]) -> str:
        columns = iter(names)
        return re.sub("<td", lambda _: f'<td data-label="{next(columns, "")}"', row[0])

    return _ROW.sub(label_row, table[0])


def on_page_context(context: dict[str, Any], page: Page, config: MkDocsConfig, nav: Navigation) -> dict[str, Any]:
    """The theme speaks the page's language, and its language menu leads to the same page in the other one."""
    chinese = page.file.src_uri.startswith("zh/")
    config.theme["language"] = "zh" if chinese else "en"
    name = page.file.src_uri.removeprefix("zh/")
    pages = {other.file.src_uri: other for other in nav.pages}
    menu = []
    for language, label, wanted in (("en", "English", name), ("zh", "中文", f"zh/{name}")):
        target = pages.get(wanted) or pages["index.md" if language == "en" else "zh/index.md"]
        menu.append({"name": label, "lang": language, "link": target.file.url})
    config.extra["alternate"] = menu
    if chinese:  # the Chinese pages come first
        context["nav"] = copy(nav)
        context["nav"].items = [nav.items[-1], *nav.items[:-1]]
    return context


def on_post_page(output: str, **_: Any) -> str:
    """Without the theme's alternates in the head: for each of them it would ask for a sitemap that is not there."""
    return re.sub(r'\s*<link rel="alternate" [^>]*hreflang[^>]*>', "", output)
