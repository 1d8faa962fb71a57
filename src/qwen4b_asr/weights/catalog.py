"""The catalog: the models known by name, and the published files that each is made of.

``weights/catalog.json`` has two tables. A *source* is one repository of the hub with the files that are wanted
from it; a *model* is what `--model` accepts: sources by role, and the recipe that turns them into a model directory.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ModelNotFoundError
from .manifest import Manifest, load_manifest, read_schema
from .paths import weights_data

FILE_NAME = "catalog.json"
RECIPES = ("shipped", "funasr-qwen4b", "sensevoice", "fun-asr-nano", "canary-qwen", "language-model")
"""What becomes of the sources: nothing, a model directory by one of the conversions, or a part of other models."""

_KEYS = {"schema": int, "kind": str, "sources": dict, "models": dict}
_SOURCE_KEYS: dict[str, type | tuple[type, ...]] = {
    "repo": str,
    "revision": (str, type(None)),
    "needed": list,
    "wanted": list,
    "licence": str,
    "manifest": (str, type(None)),
    "bytes": (int, type(None)),
    "sha256": dict,
}
_MODEL_KEYS: dict[str, type | tuple[type, ...]] = {
    "title": str,
    "recipe": str,
    "licence": (str, type(None)),
    "parts": dict,
    "aliases": list,
}
_ITEM_BYTES = {"F64": 8, "F32": 4, "U32": 4, "BF16": 2, "F16": 2}
_PACKED = "U32"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[\w.-]+(?:/[\w.-]+)*")


@dataclass(frozen=True)
class Source:
    """One repository of the hub and what is wanted from it.

    Args:
        repo: Its id, ``owner/name``.
        revision: Branch, tag or commit; None for the default branch.
        needed: What it must have. Each item is a pattern or alternatives separated by ``|``, of which the first
            that matches anything is taken; ``*`` stands for anything but a slash.
        wanted: Patterns of what is taken as well if it is there.
        licence: Under which licence it is published.
        manifest: Name of the manifest that lists its tensors, if there is one.
        stated_bytes: Size of what is needed, about, where no manifest tells.
        sha256: File name -> checksum, for files that are pinned beyond what the hub itself says of them.
    """

    repo: str
    revision: str | None = None
    needed: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()
    licence: str = "see the model card"
    manifest: str | None = None
    stated_bytes: int | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The id as a user writes it, with the revision if there is one."""
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @property
    def nbytes(self) -> int | None:
        """Bytes to download, about: what is stated, or the weights by the manifest; None if neither is there.

        Raises:
            ConfigError: If the manifest is damaged.
        """
        if self.stated_bytes is not None or self.manifest is None:
            return self.stated_bytes
        manifest = load_manifest(self.manifest)
        return sum(prod(shape) * _ITEM_BYTES[stored_dtype(manifest, name)] for name, shape in manifest.tensors.items())

    def choose(self, names: Iterable[str]) -> list[str]:
        """Return the files of a listing that are needed or wanted, in the listing's order."""
        names = list(names)
        chosen = {name for pattern in self.wanted for name in names if matches(name, pattern)}
        for item in self.needed:
            chosen.update(next((hits for hits in _alternatives(item, names) if hits), []))
        return [name for name in names if name in chosen]

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the needed items that a listing has nothing for."""
        names = list(names)
        return [item for item in self.needed if not any(_alternatives(item, names))]


@dataclass(frozen=True)
class KnownModel:
    """A model that is known by name.

    Args:
        name: What `--model` accepts.
        title: One line that says what it is.
        recipe: One of `RECIPES`.
        parts: Role -> source; the roles are those that the recipe asks for.
        aliases: Hub ids, and ModelScope ids, that mean the same.
        own_licence: Its licence where it is not that of the parts.
    """

    name: str
    title: str
    recipe: str
    parts: Mapping[str, Source]
    aliases: tuple[str, ...] = ()
    own_licence: str | None = None

    @property
    def nbytes(self) -> int | None:
        """Bytes to download, about; None if that of a part is not known."""
        sizes = [source.nbytes for source in self.parts.values()]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def licence(self) -> str:
        """Its own licence, or those of its parts, each once."""
        return self.own_licence or "; ".join(dict.fromkeys(source.licence for source in self.parts.values()))


# What a model directory, a checkpoint of Hugging Face or FunASR, or an adapter may consist of.
_ANY_NEEDED = ("config.json|config.yaml|adapter_config.json", "*.safetensors|*.pt")
_ANY_WANTED = ("*.json", "*.yaml", "*.mvn", "*.model", "*.tiktoken", "*/*.json", "*/merges.txt")


def any_source(repo: str, revision: str | None = None) -> Source:
    """Return the source for a repository that the catalog does not know: weights, and every small file beside them."""
    return Source(repo, revision, _ANY_NEEDED, _ANY_WANTED)


def parse_repo(text: str) -> Source | None:
    """Read ``owner/name`` or ``owner/name@revision``; None if the text cannot be a hub id."""
    repo, at, revision = text.partition("@")
    if not _REPO.fullmatch(repo) or ".." in text or (at and not _REVISION.fullmatch(revision)):
        return None
    return any_source(repo, revision or None)


def matches(name: str, pattern: str) -> bool:
    """Whether a path matches a pattern, folder by folder: ``*`` does not reach across a slash."""
    names, patterns = name.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def stored_dtype(manifest: Manifest, name: str) -> str:
    """Return the type of one tensor; of a manifest's two (``U32, BF16``) the first is that of tensors with scales."""
    first, _, rest = manifest.dtype.partition(", ")
    stem, _, last = name.rpartition(".")
    packed = first == _PACKED and last == "weight" and f"{stem}.scales" in manifest.tensors
    return first if packed or not rest else rest


def load_catalog(folder: Path | None = None) -> dict[str, KnownModel]:
    """Read and check the catalog.

    Args:
        folder: Where to look; the package's own data by default.

    Returns:
        Name -> model, in the catalog's order.

    Raises:
        ConfigError: If it is missing or breaks its schema.
    """
    path = (folder or weights_data()) / FILE_NAME
    values = read_schema(path, "catalog", _KEYS)
    sources = {key: _source(path, key, entry) for key, entry in values["sources"].items()}
    models: dict[str, KnownModel] = {}
    taken: set[str] = set()
    for name, entry in values["models"].items():
        _check_keys(path, name, entry, _MODEL_KEYS)
        unknown = [key for key in entry["parts"].values() if key not in sources]
        if unknown or entry["recipe"] not in RECIPES:
            wrong = f"source {unknown[0]!r}" if unknown else f"recipe {entry['recipe']!r}"
            raise ConfigError(f"{path}: {name}: unknown {wrong}")
        twice = taken & {name, *entry["aliases"]}
        if twice or "/" in name:
            raise ConfigError(f"{path}: {name}: {min(twice | {name})!r} names two models or is no name")
        taken |= {name, *entry["aliases"]}
        parts = {role: sources[key] for role, key in entry["parts"].items()}
        models[name] = KnownModel(
            name, entry["title"], entry["recipe"], parts, tuple(entry["aliases"]), entry["licence"]
        )
    return models


def find_known(name: str, catalog: Mapping[str, KnownModel] | None = None) -> KnownModel | None:
    """Return the model of a name or an alias, whatever its case; None if the catalog has none."""
    wanted = name.casefold()
    for model in (load_catalog() if catalog is None else catalog).values():
        if wanted in (model.name.casefold(), *(alias.casefold() for alias in model.aliases)):
            return model
    return None


def unknown_name(name: str, catalog: Mapping[str, KnownModel] | None = None) -> ModelNotFoundError:
    """Return the error for a name that means nothing, with the names that do."""
    names = list(load_catalog() if catalog is None else catalog)
    close = difflib.get_close_matches(name.casefold(), names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return ModelNotFoundError(
        f"{name}: no such directory, and no model of that name. {hint}Known are {', '.join(names)}; "
        "owner/name means a model of the hub"
    )


def _alternatives(item: str, names: list[str]) -> Iterable[list[str]]:
    for pattern in item.split("|"):
        yield [name for name in names if matches(name, pattern)]


def _source(path: Path, key: str, entry: Any) -> Source:
    _check_keys(path, key, entry, _SOURCE_KEYS)
    if not _REPO.fullmatch(entry["repo"]) or not entry["needed"]:
        raise ConfigError(f"{path}: {key}: repo must be owner/name, and something must be needed of it")
    for digest in entry["sha256"].values():
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ConfigError(f"{path}: {key}: {digest!r} is not a SHA-256")
    return Source(
        repo=entry["repo"],
        revision=entry["revision"],
        needed=tuple(entry["needed"]),
        wanted=tuple(entry["wanted"]),
        licence=entry["licence"],
        manifest=entry["manifest"],
        stated_bytes=entry["bytes"],
        sha256=entry["sha256"],
    )


def _check_keys(path: Path, name: str, entry: Any, keys: Mapping[str, type | tuple[type, ...]]) -> None:
    if not isinstance(entry, dict) or entry.keys() != keys.keys():
        raise ConfigError(f"{path}: {name}: keys must be {', '.join(keys)}")
    for key, wanted in keys.items():
        if not isinstance(entry[key], wanted) or isinstance(entry[key], bool):
            raise ConfigError(f"{path}: {name}: {key} has the wrong type ({type(entry[key]).__name__})")
    for key in ("needed", "wanted", "aliases"):
        if not all(isinstance(item, str) and item for item in entry.get(key, [])):
            raise ConfigError(f"{path}: {name}: {key} must hold words")
