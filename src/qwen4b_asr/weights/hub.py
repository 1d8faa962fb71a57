"""The hub: published files from Hugging Face's cache if they are there, from the network if not.

A source that is cached never touches the network, not even to ask for news. ``HF_HOME``, ``HF_HUB_CACHE``,
``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and ``HF_TOKEN`` mean what they mean everywhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DownloadError
from .catalog import Source
from .hub_transfer import RemoteFile, explained, fetch_file, partial_of, repo_folder

Progress = Callable[[str, int, int], None]

_COMMIT = re.compile("[0-9a-f]{40}")
_DEFAULT_REVISION = "main"
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class Hub:
    """Hugging Face's hub and its cache on this machine.

    Args:
        cache: Folder of the cache; None for the one that the environment names.
        endpoint: Address of the hub; None for the one that the environment names.
        offline: Whether to stay away from the network; None for what the environment says.
    """

    cache: Path | None = None
    endpoint: str | None = None
    offline: bool | None = None

    @property
    def folder(self) -> Path:
        """The cache's folder."""
        from huggingface_hub import constants

        return self.cache if self.cache is not None else Path(constants.HF_HUB_CACHE)

    def cached(self, source: Source) -> Path | None:
        """Return the snapshot that holds all that is needed of a source, or None; the network is not touched."""
        storage = repo_folder(self.folder, source.repo)
        revision = source.revision or _DEFAULT_REVISION
        commit = revision if _COMMIT.fullmatch(revision) else _read_ref(storage, revision)
        if commit is None:
            return None
        snapshot = storage / "snapshots" / commit
        names = _names_in(snapshot)
        return None if source.missing(names) or _missing_companions(snapshot, names) else snapshot

    def cached_bytes(self, source: Source) -> int:
        """Return the size of the files of a source that are in the cache, complete or not."""
        blobs = repo_folder(self.folder, source.repo) / "blobs"
        return sum(path.stat().st_size for path in blobs.iterdir()) if blobs.is_dir() else 0

    def fetch(self, source: Source, *, update: bool = False, on_progress: Progress | None = None) -> Path:
        """Return the snapshot of a source, fetching what is missing.

        Args:
            source: What is wanted.
            update: Whether to ask the hub for a newer commit although the cache has one.
            on_progress: Called with the name of the file that is being fetched, the bytes done and the bytes in all.

        Raises:
            ModelNotFoundError: If the hub has no such model or revision.
            DownloadError: If it cannot be reached, refuses, lacks a file, sends a damaged one, or the disk is full.
        """
        found = None if update else self.cached(source)
        if found is not None:
            return found
        if self._is_offline():
            raise DownloadError(
                f"{source.label}: not in the cache ({self.folder}), and HF_HUB_OFFLINE forbids to fetch it"
            )
        with explained(source.label, self.folder):
            return self._fetch(source, on_progress or (lambda name, done, total: None))

    def _fetch(self, source: Source, on_progress: Progress) -> Path:
        from huggingface_hub import HfApi

        info = HfApi(endpoint=self.endpoint).model_info(source.repo, revision=source.revision, files_metadata=True)
        commit = str(info.sha)
        siblings: list[Any] = info.siblings or []
        sizes = {str(file.rfilename): int(file.size or 0) for file in siblings}
        missing = source.missing(sizes)
        if missing:
            raise DownloadError(f"{source.label}: the hub has the model, but no {' and no '.join(missing)} in it")
        storage = repo_folder(self.folder, source.repo)
        snapshot = storage / "snapshots" / commit
        # Weights last: while they are missing, nobody takes the snapshot for whole.
        names = sorted(source.choose(sizes), key=lambda name: (sizes[name], name))
        absent = [name for name in names if not (snapshot / name).exists()]
        _check_room(source, self.folder, sum(sizes[name] for name in absent) - _partial_bytes(storage))
        done, total = 0, sum(sizes[name] for name in absent)
        for name in absent:
            # Bound now, as the closure outlives this turn of the loop.
            def report(count: int, name: str = name, done: int = done) -> None:
                on_progress(name, done + count, total)

            remote = RemoteFile(source.repo, commit, name, source.sha256.get(name))
            fetch_file(remote, cache=self.folder, endpoint=self.endpoint, on_bytes=report)
            done += sizes[name]
            on_progress(name, done, total)
        lacking = _missing_companions(snapshot, _names_in(snapshot))
        if lacking:
            raise DownloadError(f"{source.label}: the model's index lists {lacking[0]}, which the hub does not have")
        _write_ref(storage, source.revision or _DEFAULT_REVISION, commit)
        return snapshot

    def _is_offline(self) -> bool:
        from huggingface_hub import constants

        return bool(constants.HF_HUB_OFFLINE) if self.offline is None else self.offline


def _names_in(snapshot: Path) -> list[str]:
    """Files of a snapshot whose bytes are there; a link whose blob was deleted does not count."""
    if not snapshot.is_dir():
        return []
    return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())


def _missing_companions(snapshot: Path, names: Iterable[str]) -> list[str]:
    """Files that the snapshot's own lists name, shards and the content of a model directory, and that are not there."""
    names = set(names)
    listed: set[str] = set()
    for name in names:
        if name.endswith(".index.json"):
            listed |= {_beside(name, shard) for shard in _read_object(snapshot / name, "weight_map").values()}
        elif name == "checksums.json":
            listed |= _read_object(snapshot / name, "files").keys()
    return sorted(listed - names)


def _beside(name: str, other: object) -> str:
    folder, slash, _ = name.rpartition("/")
    return f"{folder}{slash}{other}"


def _read_object(path: Path, key: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # whoever reads the model says what is wrong with the file
    return value if isinstance(value, dict) else {}


def _read_ref(storage: Path, revision: str) -> str | None:
    try:
        text = (storage / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return text if _COMMIT.fullmatch(text) else None


def _write_ref(storage: Path, revision: str, commit: str) -> None:
    """Note which commit a branch or tag is; last of all, so that a broken run leaves no trace of being whole."""
    if _COMMIT.fullmatch(revision):
        return
    path = storage / "refs" / revision
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(commit, encoding="utf-8")
    os.replace(partial, path)


def _partial_bytes(storage: Path) -> int:
    blobs = storage / "blobs"
    mark = partial_of(Path("x")).suffix
    return sum(path.stat().st_size for path in blobs.glob(f"*{mark}")) if blobs.is_dir() else 0


def _check_room(source: Source, cache: Path, wanted: int) -> None:
    place = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if wanted > 0 and wanted + _SPARE_BYTES > free:
        raise DownloadError(
            f"{source.label}: {wanted / 1e9:.2f} GB are to come, but {cache} has room for {free / 1e9:.2f} GB; "
            "make room, or set HF_HOME to another disk"
        )
