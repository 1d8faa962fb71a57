"""From a name to a model directory by whatever it takes: look, fetch, convert."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, ModelNotFoundError
from .catalog import KnownModel, Source, find_known, parse_repo
from .conversion import Conversion
from .convert import convert, convert_checkpoint
from .find import find_local, find_model, is_model_directory, models_folder
from .hub import Hub, Progress
from .recipes import Recipe as Quantisation

ProgressBar = Callable[[str], AbstractContextManager[Progress | None]]
"""Opens a bar under a title, and gives what to call with a name, the bytes done and the bytes in all."""


@dataclass(frozen=True)
class Parts:
    """What a recipe works on.

    Args:
        model: The model that is to be made.
        folders: Role -> folder with the files of that source.
        quantise: What to quantise, and how.
        on_done: As in `convert.convert`.
    """

    model: KnownModel
    folders: Mapping[str, Path]
    quantise: Quantisation | None = None
    on_done: Callable[[Conversion], None] | None = None

    def file(self, role: str) -> Path:
        """Return the one file that a source of one file consists of."""
        folder = self.folders[role]
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        return folder / self.model.parts[role].choose(names)[0]


Recipe = Callable[[Parts, Path, bool, Progress | None], None]


def _funasr_qwen4b(parts: Parts, output: Path, force: bool, on_progress: Progress | None) -> None:
    convert(
        encoder=parts.folders["encoder"],
        adaptor=parts.file("adaptor"),
        llm=parts.folders["llm"],
        output=output,
        force=force,
        recipe=parts.quantise,
        on_progress=on_progress,
        on_done=parts.on_done,
    )


def _whole(parts: Parts, output: Path, force: bool, on_progress: Progress | None) -> None:
    convert_checkpoint(
        parts.folders["model"],
        output,
        tokenizer=parts.folders.get("llm"),
        force=force,
        recipe=parts.quantise,
        on_progress=on_progress,
        on_done=parts.on_done,
    )


CONVERSIONS: Mapping[str, Recipe] = {
    "funasr-qwen4b": _funasr_qwen4b,
    "sensevoice": _whole,
    "fun-asr-nano": _whole,
    "canary-qwen": _whole,
}
"""How the sources of a catalog's model become a model directory, by the catalog's recipe."""


@contextmanager
def no_progress(title: str) -> Iterator[Progress | None]:
    """Show nothing."""
    yield None


def obtain_model(
    path_or_name: str | os.PathLike[str],
    *,
    output: Path | None = None,
    update: bool = False,
    force: bool = False,
    hub: Hub | None = None,
    quantise: Quantisation | None = None,
    on_done: Callable[[Conversion], None] | None = None,
    progress: ProgressBar = no_progress,
) -> Path:
    """Return the directory of a model; what is not on this machine is fetched, and converted if it must be.

    A model that is here causes no request to the network.

    Args:
        path_or_name: What `find_model` takes.
        output: Where the model directory is to be made; the folder of models by default.
        update: Whether to fetch the newest files, and convert them, although there is a model.
        force: Whether a model directory at `output` is replaced.
        hub: Where to fetch from.
        quantise: What to quantise, and how. Such a model has the recipe's name behind its own, ``NAME-4``, so that it
            can stand beside the one that is not quantised.
        on_done: As in `convert.convert`; only called if something is converted.
        progress: Draws a bar for each of the two steps.

    Raises:
        ModelNotFoundError: If there is no such model, here or on the hub, or it is not one that can be run.
        DownloadError: If it cannot be fetched.
        CheckpointError: If what was fetched does not fit together, or the output cannot be written.
    """
    name = os.fspath(path_or_name)
    hub = hub or Hub()
    known = None if Path(name).expanduser().is_dir() else find_known(name)
    made = name if known is None or quantise is None else f"{known.name}-{quantise.name}"
    found = None if update or (known is not None and output is not None) else find_local(made, hub=hub)
    convertible = known is not None and known.recipe in CONVERSIONS
    if quantise is not None and not convertible:
        raise ConfigError(f"{name}: is not converted here, so it cannot be quantised; convert --checkpoint can")
    if found is not None:
        return found
    if known is not None and convertible:
        folders = fetch_sources(known.parts, update=update, hub=hub, progress=progress)
        target = output or models_folder() / (known.name if quantise is None else made)
        with progress("converting") as on_progress:
            CONVERSIONS[known.recipe](Parts(known, folders, quantise, on_done), target, force or update, on_progress)
        return target
    source = parse_repo(name) if known is None else None
    if source is None:
        if known is not None and known.recipe not in ("shipped", "language-model"):
            raise ConfigError(f"{known.name}: there is no conversion for it in this version")
        return find_model(name, hub=hub)  # says what is wrong
    (snapshot,) = fetch_sources({name: source}, update=update, hub=hub, progress=progress).values()
    if not is_model_directory(snapshot):
        raise ModelNotFoundError(
            f"{name}: a checkpoint, not a model directory of this program; it is in {snapshot}, for qwen4b-asr convert"
        )
    return snapshot


def fetch_sources(
    sources: Mapping[str, Source],
    *,
    update: bool = False,
    hub: Hub | None = None,
    progress: ProgressBar = no_progress,
) -> dict[str, Path]:
    """Bring sources into the hub's cache, one after another.

    Args:
        sources: Role -> source.
        update: Whether to ask the hub for newer files.
        hub: Where to fetch from.
        progress: Draws a bar for each source.

    Returns:
        Role -> folder with its files.
    """
    hub = hub or Hub()
    folders = {}
    for role, source in sources.items():
        with progress(f"downloading {source.repo}") as on_progress:
            folders[role] = hub.fetch(source, update=update, on_progress=on_progress)
    return folders
