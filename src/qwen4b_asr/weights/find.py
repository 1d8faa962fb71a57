"""From the name or path that a user gives to a model directory on this machine; the network is not touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import ModelNotFoundError
from .catalog import KnownModel, find_known, parse_repo, unknown_name
from .hub import Hub
from .paths import weights_data

BUILT_IN = {"demo": "demo"}
"""Models that come with the package, and their folders beside the manifests."""

MODELS_VARIABLE = "QWEN4B_ASR_MODELS"

ADVICE = """\
  - try the small model that comes with the package (it knows only spoken numbers): --model demo
  - or see what is known by name, fetch it and use it by that name:
      qwen4b-asr models
      qwen4b-asr download funasr-qwen4b
  - or give a directory that `qwen4b-asr convert` wrote, or owner/name of such a model on the hub"""


def models_folder() -> Path:
    """Return the folder of the models that were made here from downloaded parts, one directory each.

    It is what ``QWEN4B_ASR_MODELS`` names, else ``qwen4b-asr/models`` in the user's cache.
    """
    named = os.environ.get(MODELS_VARIABLE)
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "qwen4b-asr" / "models"


def find_model(path_or_name: str | os.PathLike[str], *, hub: Hub | None = None) -> Path:
    """Return the directory of a model that is on this machine.

    A directory of the given path comes first, so nothing that the catalog or the hub calls the same hides it.

    Args:
        path_or_name: The path of a directory that ``qwen4b-asr convert`` wrote, a name of the catalog, or the hub id
            ``owner/name`` or ``owner/name@revision`` of such a directory.
        hub: Where to look for hub ids; Hugging Face's cache by default.

    Raises:
        ModelNotFoundError: If it is not here; the message says how to get it.
    """
    name = os.fspath(path_or_name)
    found = find_local(name, hub=hub)
    if found is not None:
        return found
    known = find_known(name)
    if known is not None:
        raise ModelNotFoundError(_absent(known))
    if parse_repo(name) is not None:
        raise ModelNotFoundError(f"{name}: no such directory, and not in the hub's cache; qwen4b-asr download {name}")
    if Path(name).expanduser().is_file():
        raise ModelNotFoundError(f"{name}: is a file, not a model directory. What you can do:\n{ADVICE}")
    if "/" not in name and os.sep not in name and not name.startswith((".", "~")):
        raise unknown_name(name)
    raise ModelNotFoundError(f"{name}: no such model directory. What you can do:\n{ADVICE}")


def find_local(name: str, *, hub: Hub | None = None) -> Path | None:
    """Return the directory of a model if it is on this machine, and None if not; see `find_model`."""
    if name in BUILT_IN:
        return weights_data() / BUILT_IN[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    known = find_known(name)
    if known is not None:
        made = models_folder() / known.name
        return made if is_model_directory(made) else None
    if Path(name).name == name and is_model_directory(models_folder() / name):  # such as NAME-4, a quantised one
        return models_folder() / name
    source = parse_repo(name)
    snapshot = (hub or Hub()).cached(source) if source is not None else None
    return snapshot if snapshot is not None and is_model_directory(snapshot) else None


def is_model_directory(path: Path) -> bool:
    """Whether a directory is one that this program wrote: its configuration has a schema of ours."""
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "schema" in values


def _absent(known: KnownModel) -> str:
    size = f"{known.nbytes / 1e9:.1f} GB" if known.nbytes else "it"
    if known.recipe == "language-model":
        return f"{known.name}: a language model, no recogniser; it can be the --llm of qwen4b-asr convert"
    return f"{known.name}: not on this machine; qwen4b-asr download {known.name} fetches {size}"
