"""Where the manifests, key maps and small checkpoints of this package lie."""

from __future__ import annotations

from pathlib import Path


def weights_data() -> Path:
    """Return the folder of manifests, key maps and the demo checkpoint.

    An installed package carries it as ``data`` beside this file; a checkout keeps it
    at the top level as ``weights``. The module's own copy comes first, so an old
    installation is never read by a newer checkout.

    Raises:
        FileNotFoundError: If neither folder is there, that is, the installation is damaged.
    """
    here = Path(__file__).resolve().parent
    candidates = [here / "data"]
    if len(here.parents) > 2:
        candidates.append(here.parents[2] / "weights")
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"[weights_data] the package's data folder must be one of {[str(c) for c in candidates]}")
