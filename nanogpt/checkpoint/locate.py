"""From the path that a user gives to the files that hold the model: a file, or a folder of any family.

Training scripts leave a symlink ``latest_checkpoint.pt``, hub caches link everything. zip, git and scp turn symlinks
into small files that hold the path they pointed to; ``follow`` reads those as the symlinks they were. Opens nothing
larger than that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nanogpt.errors import CheckpointNotFound

EMBEDDED: Final = Path(__file__).resolve().parent.parent / "assets" / "default"

_LATEST: Final = "latest_checkpoint.pt"
_BEST: Final = "best_checkpoint.pt"
_MAX_LINK_BYTES: Final = 1024
_MAX_LINKS: Final = 8
_STEP = re.compile(r"^(?:model|ckpt|state_step)_?0*(\d+)\.(?:pt|bin)$")
_NOT_MODELS = re.compile(r"^(?:optim|state_|.*tokenizer|token_bytes|training_args|scheduler|rng_state)")
_HF_WEIGHTS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True, slots=True)
class Found:
    """``path`` names the model. ``weights`` is its file, or the index of several; ``config`` is a Hugging Face one."""

    path: Path
    weights: Path
    config: Path | None = None


def locate(path: str | Path) -> Found:
    """The model at a path; an empty one is the model that lies in the package.

    Raises: CheckpointNotFound, saying what is there instead.
    """
    given = Path(path) if str(path) else EMBEDDED
    try:
        given = given.expanduser()
        if not given.exists():
            raise CheckpointNotFound(f"There is nothing at {given}.", remedy=_near(given))
        if given.is_dir():
            return _in_folder(given)
        if not given.is_file():
            raise CheckpointNotFound(f"{given} is neither a file nor a folder.")
        target = follow(_resolved(given))
        if target.name in _HF_WEIGHTS or target.name == "config.json" or _is_shard(target):
            return _hugging_face(target.parent) or Found(target, target)
        return Found(target, target)
    except OSError as error:
        raise CheckpointNotFound(f"Cannot read {given}: {error.strerror or error}.") from None
    except (RuntimeError, ValueError) as error:  # ~nobody, a NUL in the path
        raise CheckpointNotFound(f"{str(given)!r} is no path: {error}.") from None


def follow(path: Path) -> Path:
    """The file that a flattened symlink names; any other file is itself. Real symlinks are the system's business."""
    for _ in range(_MAX_LINKS):
        target = _link_target(path)
        if target is None:
            return path
        path = target
    raise CheckpointNotFound(f"{path} is one of a circle of links.")


def _link_target(path: Path) -> Path | None:
    if not path.is_file() or not 0 < path.stat().st_size <= _MAX_LINK_BYTES:
        return None
    try:
        text = path.read_bytes().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        return None
    if not text or not text.isprintable() or text.startswith(("/", "{", "[")):
        return None
    target = path.parent / text
    try:
        return target if target.is_file() and not target.samefile(path) else None
    except OSError:  # a text that is no path, such as a name that is too long
        return None


def _in_folder(folder: Path) -> Found:
    found = _hugging_face(folder)
    if found is not None:
        return found
    for choose in (_latest, _nanogpt, _newest_step, _only_one):
        file = choose(folder)
        if file is not None:
            target = follow(_resolved(file))
            return Found(target, target)
    raise CheckpointNotFound(f"There is no checkpoint in the folder {folder}.", remedy=_near(folder))


def _hugging_face(folder: Path) -> Found | None:
    config = folder / "config.json"
    for name in _HF_WEIGHTS:
        if config.is_file() and (folder / name).is_file():
            return Found(folder, follow(folder / name), follow(config))
    return None


def _latest(folder: Path) -> Path | None:
    link = folder / _LATEST
    if not link.is_file():
        return None
    may_dangle = not link.is_symlink() and link.stat().st_size <= _MAX_LINK_BYTES
    return None if may_dangle and _link_target(link) is None else link


def _resolved(path: Path) -> Path:
    """The checkpoint that one of training's own links means, which has the better name. Hub caches link to hashes."""
    return path.resolve() if path.name in (_LATEST, _BEST) else path


def _nanogpt(folder: Path) -> Path | None:
    return folder / "ckpt.pt" if (folder / "ckpt.pt").is_file() else None


def _newest_step(folder: Path) -> Path | None:
    if (folder / "model_final.pt").is_file():
        return folder / "model_final.pt"
    steps = [(int(match[1]), file) for file in _files(folder) if (match := _STEP.match(file.name))]
    return max(steps)[1] if steps else None


def _only_one(folder: Path) -> Path | None:
    files = _candidates(folder)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8])
        raise CheckpointNotFound(f"The folder {folder} holds several models: {names}.", remedy="Name one of them.")
    return files[0] if files else None


def _candidates(folder: Path) -> list[Path]:
    endings = (".pt", ".pth", ".safetensors", ".bin")
    return [file for file in _files(folder) if file.suffix in endings and not _NOT_MODELS.match(file.name)]


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file())


def _is_shard(file: Path) -> bool:
    return re.fullmatch(r"(?:model|pytorch_model)-\d+-of-\d+\.(?:safetensors|bin)", file.name) is not None


def _near(path: Path) -> str:
    """What a user who is one folder off may have meant."""
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return "Give a file, or a folder such as log/."
    is_model: Callable[[Path], bool] = lambda sub: _hugging_face(sub) is not None or bool(_candidates(sub))  # noqa: E731
    here = [] if folder == path else [file.name for file in _candidates(folder)]
    below = [f"{sub.name}/" for sub in sorted(folder.iterdir())[:200] if sub.is_dir() and is_model(sub)]
    names = ", ".join((here + below)[:8])
    return f"In {folder} there is {names}." if names else "Give a file, or a folder such as log/."
