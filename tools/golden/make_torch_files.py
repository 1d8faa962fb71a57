"""Write the tiny torch files of tests/data/torch with torch itself.

    python tools/golden/make_torch_files.py tests/data/torch

Every file is a few kB. What each should read as is in ``expected.json`` beside them:
name -> [type, shape, values in row-major order], so the tests need no torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_REBUILT_BY_V3 = (torch.uint16, torch.uint32, torch.uint64)  # not in the old format


def _sample(dtype: Any, *shape: int) -> Any:
    count = 1
    for size in shape:
        count *= size
    values = torch.arange(count, dtype=torch.float64) - (0 if "uint" in str(dtype) else count // 2)
    if dtype.is_floating_point:
        values = values / 8  # exact in every floating type here
    elif dtype == torch.bool:
        values = values.remainder(3)
    return values.to(dtype).reshape(shape)


def _cases() -> dict[str, tuple[Any, bool]]:
    """Return file stem -> (object to save, whether it can be saved in the old format too)."""
    base = _sample(torch.float32, 6, 8)
    linear = torch.nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(_sample(torch.float32, 2, 3))
        linear.bias.copy_(_sample(torch.float32, 2))
    state = linear.state_dict()
    return {
        "dtypes": ({str(d): _sample(d, 2, 3) for d in _NAMES if d not in _REBUILT_BY_V3}, True),
        "dtypes_v3": ({str(d): _sample(d, 2, 3) for d in _REBUILT_BY_V3}, False),
        "views": (
            {
                "whole": base,
                "transposed": base.T,
                "rows": base[2:5],
                "columns": base[:, 1::3],
                "offset": base.reshape(-1)[7:],
                "permuted": _sample(torch.bfloat16, 2, 3, 4).permute(2, 0, 1),
                "scalar": base[3, 3],
                "empty": base[:0],
                "half_column": _sample(torch.float16, 4, 4)[:, 2],
            },
            True,
        ),
        "state_dict": (state, True),
        "parameters": ({"p": torch.nn.Parameter(_sample(torch.float32, 3)), "b": _sample(torch.float32, 2)}, True),
        "wrapped_state_dict": ({"epoch": 3, "state_dict": state, "loss": 0.25, "note": "x"}, True),
        "wrapped_model_module": ({"model": {f"module.{k}": v for k, v in state.items()}}, True),
        "wrapped_module": ({"module": dict(state), "size": torch.Size([2, 3])}, True),
    }


def main(folder: Path) -> None:
    """Write all files and what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, dict[str, Any]] = {}
    for stem, (content, has_legacy) in _cases().items():
        tensors = content
        for key in ("state_dict", "model", "module"):
            tensors = tensors.get(key, tensors)
        named = {name.removeprefix("module."): t for name, t in tensors.items()}
        values = {n: [_NAMES[t.dtype], list(t.shape), t.detach().flatten().tolist()] for n, t in named.items()}
        torch.save(content, folder / f"{stem}.pt")
        expected[f"{stem}.pt"] = values
        if has_legacy:
            torch.save(content, folder / f"{stem}.legacy.pt", _use_new_zipfile_serialization=False)
            expected[f"{stem}.legacy.pt"] = values
    # Refused: a whole module instead of its tensors, and a tensor that claims more than its storage holds.
    torch.save(torch.nn.Linear(2, 2), folder / "whole_module.pt")
    torch.save({"expanded": torch.ones(1).expand(1000)}, folder / "expanded.pt")
    document = {"torch": torch.__version__.split("+")[0], "files": expected}
    (folder / "expected.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
