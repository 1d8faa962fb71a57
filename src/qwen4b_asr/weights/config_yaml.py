"""The few settings that conversion needs from FunASR's ``config.yaml``, read without a YAML library.

What the shapes of tensors cannot tell is the number of attention heads, the shift of the memory
block and the front end's constants. The file is plain block YAML; only mappings of scalars are
understood here, anything else (lists, flow mappings, anchors) is stepped over.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError

_LINE = re.compile(r"(?P<indent> *)(?P<key>[A-Za-z_]\w*)\s*:(?:\s+(?P<value>.*))?$")
_MAX_BYTES = 1 << 20


def read_config_yaml(path: Path) -> dict[str, str]:
    """Return the scalars of a block-style YAML file under dotted keys, as text.

    ``encoder_conf:`` followed by an indented ``attention_heads: 4`` gives
    ``{"encoder_conf.attention_heads": "4"}``.

    Raises:
        CheckpointError: If the file cannot be read as text.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as text ({error})") from error
    scalars: dict[str, str] = {}
    open_keys: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = _LINE.match(re.sub(r"(^|\s)#.*", "", line).rstrip())
        if not match:
            continue
        indent, value = len(match["indent"]), (match["value"] or "").strip()
        while open_keys and open_keys[-1][0] >= indent:
            open_keys.pop()
        open_keys.append((indent, match["key"]))
        if value:
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
            scalars[".".join(key for _, key in open_keys)] = value[1:-1] if quoted else value
    return scalars
