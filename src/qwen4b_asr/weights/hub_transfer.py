"""Fetch one file of the hub into Hugging Face's cache: resumed where it broke off, and checked before it counts.

`huggingface_hub` alone starts a file again after a broken run, and trusts what arrives. The bytes are therefore
fetched here, through its own `http_get`, into ``blobs/<etag>.incomplete`` (where its older releases kept them too),
compared with the checksum, and renamed to ``blobs/<etag>``; then the library links the blob into the snapshot. The
layout is the documented one, so every other tool finds the files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from ..errors import AsrError, DownloadError, ModelNotFoundError

_SHA256 = re.compile("[0-9a-f]{64}")
_GIT_SHA1 = re.compile("[0-9a-f]{40}")
_SAFE_ETAG = re.compile(r"\w[\w.-]*")
_TRANSPORTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
"""Packages of the errors that mean no connection; which of them is there depends on huggingface_hub's release."""

BytesDone = Callable[[int], None]


@dataclass(frozen=True)
class RemoteFile:
    """One file of one commit of a repository.

    Args:
        repo: The repository's id.
        commit: The commit's hash.
        name: The file's path in it.
        sha256: The checksum that the catalog pins, if it does.
    """

    repo: str
    commit: str
    name: str
    sha256: str | None = None


def fetch_file(file: RemoteFile, *, cache: Path, endpoint: str | None, on_bytes: BytesDone) -> Path:
    """Bring one file into the cache and link it into its snapshot.

    Args:
        file: What to fetch.
        cache: Folder of Hugging Face's cache.
        endpoint: Address of the hub; None for the one that ``HF_ENDPOINT`` names, or the public one.
        on_bytes: Called with the number of bytes of this file that are there, now and then.

    Returns:
        The path in the snapshot.

    Raises:
        DownloadError: If what arrives does not have its checksum or its size, or the server tells of neither.
        Exception: Whatever the network and the disk raise; `explained` turns it into one line.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    storage = repo_folder(cache, file.repo)
    url = hf_hub_url(file.repo, file.name, revision=file.commit, endpoint=endpoint)
    remote = get_hf_file_metadata(url)
    etag = remote.etag or ""
    if not _SAFE_ETAG.fullmatch(etag) or remote.commit_hash != file.commit:
        raise DownloadError(f"{file.repo}: {file.name}: the server does not answer as a hub does; look at HF_ENDPOINT")
    headers = {**build_hf_headers(), "accept-encoding": "identity"}  # a compressed body could not be resumed
    if urlsplit(remote.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # where large files lie is nobody to show a token to
    blob = storage / "blobs" / etag
    lock = cache / ".locks" / storage.name / f"{etag}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():
            _fetch_blob(file, remote.location, headers, blob, remote.size, on_bytes)
    # The blob is there, so this only links (or, on a disk without links, copies) it.
    return Path(hf_hub_download(file.repo, file.name, revision=file.commit, cache_dir=cache, endpoint=endpoint))


def partial_of(blob: Path) -> Path:
    """Return where a blob lies while it is not complete."""
    return blob.with_name(f"{blob.name}.incomplete")


def repo_folder(cache: Path, repo: str) -> Path:
    """Return the folder of a repository in Hugging Face's cache."""
    return cache / f"models--{repo.replace('/', '--')}"


def _fetch_blob(
    file: RemoteFile, address: str, headers: dict[str, str], blob: Path, size: int | None, on_bytes: BytesDone
) -> None:
    """Continue or begin the transfer; move the result in place only if its checksum is right.

    A connection that drops is taken up again as long as each attempt brings something. If bytes from an earlier
    attempt are in the file, they may be what is wrong with it, so then one more attempt starts from nothing.
    """
    partial = partial_of(blob)
    checksum = _checksum(file, blob.name)
    while True:
        resumed = _length(partial)
        if size is not None and resumed > size:
            partial.unlink()
            resumed = 0
        try:
            _transfer(address, headers, partial, resumed, size, on_bytes)
        except Exception as error:
            if _is_transport(error) and _length(partial) > resumed:
                continue
            if not _is_inconsistency(error):
                raise
        problem = _problem(partial, size, checksum)
        if problem is None:
            os.replace(partial, blob)
            return
        partial.unlink()
        if not resumed:
            raise DownloadError(f"{file.repo}: {file.name}: {problem}; nothing was kept. Try again later")


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_transport(error: Exception) -> bool:
    """Whether an error is of the network; `huggingface_hub`'s own errors may be of the client's classes too."""
    return type(error).__module__.partition(".")[0] in _TRANSPORTS


def _is_inconsistency(error: Exception) -> bool:
    """Whether it is `http_get`'s own error for a wrong length, the only bare OSError without a number."""
    return type(error) is OSError and error.errno is None


def _transfer(
    address: str, headers: dict[str, str], partial: Path, resumed: int, size: int | None, on_bytes: BytesDone
) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    if shown:  # the caller draws one bar for all files
        disable_progress_bars()
    try:
        with partial.open("ab") as sink:
            counting: Any = _Counting(sink, on_bytes)
            on_bytes(resumed)
            http_get(address, counting, headers=headers, resume_size=resumed, expected_size=size)
    finally:
        if shown:
            enable_progress_bars()


class _Counting:
    """A file that reports its length after each write, and otherwise is the file itself."""

    def __init__(self, file: BinaryIO, on_bytes: BytesDone) -> None:
        self._file = file
        self._on_bytes = on_bytes

    def write(self, data: bytes) -> int:
        written = self._file.write(data)
        self._on_bytes(self._file.tell())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _checksum(file: RemoteFile, etag: str) -> str | None:
    """The checksum to hold the file against: the pinned one, or the etag, which of large files is the SHA-256.

    Raises:
        DownloadError: If the hub has another file than the one that is pinned.
    """
    if file.sha256 is not None and _SHA256.fullmatch(etag) and etag != file.sha256:
        raise DownloadError(f"{file.repo}: {file.name}: the hub now has another file than the one that was checked")
    return file.sha256 or (etag if _SHA256.fullmatch(etag) or _GIT_SHA1.fullmatch(etag) else None)


def _problem(path: Path, size: int | None, checksum: str | None) -> str | None:
    length = path.stat().st_size
    if size is not None and length != size:
        return f"{length} bytes arrived instead of {size}"
    if checksum is not None and _digest(path, len(checksum)) != checksum:
        return "what arrived does not have the checksum that the hub gives"
    return None


def _digest(path: Path, digits: int) -> str:
    """SHA-256, or for 40 digits the hash under which git stores the file: SHA-1 behind a header with the length."""
    if digits == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def explained(what: str, cache: Path) -> Iterator[None]:
    """Turn what the network, the hub and the disk raise into one line that says what to do.

    Args:
        what: The model, for the message.
        cache: Where the files go, for the message.

    Raises:
        ModelNotFoundError: If the hub has no such model or revision.
        DownloadError: For all else that is foreseen; anything unforeseen passes unchanged.
    """
    try:
        yield
    except AsrError:
        raise
    except Exception as error:
        said = _explain(error, what, cache)
        if said is None:
            raise
        raise said from error


def _explain(error: Exception, what: str, cache: Path) -> AsrError | None:
    from huggingface_hub import errors

    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return DownloadError(f"{what}: not in the cache, and HF_HUB_OFFLINE forbids to fetch it")
    if isinstance(error, errors.GatedRepoError):
        return DownloadError(f"{what}: its publisher asks for consent: give it on the model's page, then set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(f"{what}: the hub has the model but not this revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"{what}: no such directory, and the hub has no such model or keeps it private (then set HF_TOKEN)"
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            return DownloadError(f"{what}: the hub refuses access ({status}): HF_TOKEN is wrong or lacks permission")
        advice = "it asks for patience; try again later" if status == 429 or status >= 500 else first
        return DownloadError(f"{what}: the hub answers {status}: {advice}")
    if isinstance(error, json.JSONDecodeError):  # before the next: requests has a class of its own for it
        return DownloadError(f"{what}: the server does not answer as a hub does; look at HF_ENDPOINT")
    if _is_transport(error):
        return DownloadError(
            f"{what}: not in the cache, and the hub cannot be reached ({type(error).__name__}); try again when there "
            "is a network (what has arrived is kept), or give a directory"
        )
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DownloadError(f"{what}: the disk is full ({cache}); make room and repeat: what has arrived is kept")
        if error.errno is not None:
            return DownloadError(f"{what}: {cache} cannot be written ({error.strerror or error})")
        return DownloadError(f"{what}: {first}")
    return None
