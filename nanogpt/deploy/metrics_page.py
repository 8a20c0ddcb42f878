"""The pages of several replicas' ``/metrics`` as one page: each sample gets the label ``replica``."""

from __future__ import annotations

from collections.abc import Iterable

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def merge(pages: Iterable[tuple[str, str]]) -> str:
    """Pages in Prometheus' text format, with the name of the replica that each is from."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for replica, page in sorted(pages):
        family: tuple[list[str], list[str]] | None = None
        for line in page.splitlines():
            if line.startswith("# "):
                _, _, name, *_ = line.split(" ", 3)
                family = families.setdefault(name, ([], []))
                if line not in family[0] and len(family[0]) < 2:
                    family[0].append(line)
            elif line and family is not None:
                family[1].append(_labelled(line, replica))
    return "".join(f"{line}\n" for about, samples in families.values() for line in (*about, *samples))


def _labelled(sample: str, replica: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f'{name}{{replica="{replica}",{rest}'
    name, _, value = sample.partition(" ")
    return f'{name}{{replica="{replica}"}} {value}'
