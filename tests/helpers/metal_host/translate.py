"""Metal text to C++ text for the headers in include/.

The headers make almost all of Metal's vocabulary C++. Four things are rewritten here:

* ``threadgroup float tile[32];`` becomes a reference to memory that the engine owns, guards and poisons;
* ``1.0h`` and ``1.0bf`` become casts;
* the instantiation that MLX appends loses its ``[[host_name]]``;
* an entry point is added that reads the kernel's arguments out of an array of pointers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

VECTOR_ATTRIBUTES = {
    "thread_position_in_grid": "thread_position_in_grid",
    "thread_position_in_threadgroup": "thread_position_in_threadgroup",
    "threadgroup_position_in_grid": "threadgroup_position_in_grid",
    "threads_per_threadgroup": "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup": "dispatch_threads_per_threadgroup",
    "threads_per_grid": "threads_per_grid",
    "grid_size": "threads_per_grid",
    "threadgroups_per_grid": "threadgroups_per_grid",
}
SCALAR_ATTRIBUTES = {
    "thread_index_in_threadgroup": "t->thread_index_in_threadgroup",
    "thread_index_in_simdgroup": "t->thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup": "t->simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup": "t->simdgroups_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup": "t->dispatch_simdgroups_per_threadgroup",
    "threads_per_simdgroup": "metal_host::SIMD_WIDTH",
    "thread_execution_width": "metal_host::SIMD_WIDTH",
    "thread_index_in_quadgroup": "t->thread_index_in_threadgroup % 4",
    "quadgroup_index_in_threadgroup": "t->thread_index_in_threadgroup / 4",
    "quadgroups_per_threadgroup": "(t->simdgroups_per_threadgroup * 8)",
}

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_HALF_LITERAL = re.compile(r"(?<![\w.])((?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)(h|H|bf|BF)\b")
_THREADGROUP = re.compile(r"\bthreadgroup\b")
_DECLARATOR = re.compile(r"(\w+)\s*((?:\[[^\]]*\]\s*)*)")
_SIGNATURE = re.compile(r"\[\[kernel\]\]\s+void\s+(\w+)\s*\(")
_INSTANTIATION = re.compile(r"\ntemplate \[\[host_name\(\"[^\"]*\"\)\]\] \[\[kernel\]\] decltype\((.*)\) .*;\s*$")
# Not uint2 and uint3 by themselves: those are positions of threads.
_VECTORS = re.compile(
    r"\b(?:(?:bool|u?char|u?short|int|u?long|half|float|bfloat)[234]|uint4)\b|\buint[23]\s*\*|\bvec\s*<"
)


class TranslationError(ValueError):
    """The text declares something that Metal or this translation does not know."""


@dataclass(frozen=True)
class Translation:
    """A kernel as C++.

    Attributes:
        text: The C++ source.
        uses_vectors: Whether it names vector types, which need arrays aligned as MLX allocates them.
    """

    text: str
    uses_vectors: bool


def without_comments(text: str) -> str:
    """Blank out comments, keeping every line where it is."""
    return _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def half_literals(text: str) -> str:
    """Spell ``1.0h`` and ``1.0bf`` as casts, which every C++ compiler knows."""
    return _HALF_LITERAL.sub(lambda match: f"{'half' if match[2] in 'hH' else 'bfloat'}({match[1]})", text)


def split_top_level(text: str, separator: str = ",") -> list[str]:
    """Split at separators that stand in no bracket of any kind."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == separator and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _statement_end(text: str, start: int) -> int | None:
    """Index of the semicolon that ends the statement, or None where a bracket closes first (a parameter)."""
    depth = 0
    for position in range(start, len(text)):
        letter = text[position]
        depth += (letter in "([{") - (letter in ")]}")
        if depth < 0:
            return None
        if letter == ";" and depth == 0:
            return position
    return None


def declarations(text: str) -> list[tuple[int, int, str, list[tuple[str, str]]]]:
    """Find the declarations of threadgroup variables (not of pointers into threadgroup memory).

    Args:
        text: Metal text without comments.

    Returns:
        For each: start and end in the text, type, and (name, dimensions) of its variables.

    Raises:
        TranslationError: If one has an initialiser, which Metal does not allow.
    """
    found = []
    for keyword in _THREADGROUP.finditer(text):
        before = text[: keyword.start()].rstrip()
        before = re.sub(r"\b(?:static|const|volatile)$", "", before).rstrip()
        if before and before[-1] not in ";{}):":
            continue  # inside of a cast, a template argument or a parameter list
        end = _statement_end(text, keyword.end())
        if end is None:
            continue
        first, *others = split_top_level(text[keyword.end() : end]) or [""]
        if re.search(r"[*&(]", first.split("[")[0].split("=")[0]):
            continue
        match = re.fullmatch(r"(.*?[\s>])(\w+\s*(?:\[.*\]\s*)?)(=.*)?", first, re.S)
        if not match or match.group(1).split()[0] in ("return",):
            continue
        if match.group(3) or any("=" in other for other in others):
            raise TranslationError(f"threadgroup variables take no initialiser but got {first!r}")
        variables = []
        for declarator in (match.group(2), *others):
            parts = _DECLARATOR.fullmatch(declarator.strip())
            if not parts:
                raise TranslationError(f"threadgroup declarations should be names and arrays but got {declarator!r}")
            variables.append((parts.group(1), parts.group(2).strip()))
        found.append((keyword.start(), end + 1, match.group(1).strip(), variables))
    return found


def _replace_declarations(text: str) -> str:
    pieces, position = [], 0
    for start, end, kind, variables in declarations(text):
        line = text.count("\n", 0, start) + 1
        kind = re.sub(r"\b(?:static|const|volatile)\b\s*", "", kind)
        references = [
            f"using {name}_threadgroup_t = {kind}{dimensions}; {name}_threadgroup_t& {name} = "
            f'metal_host::threadgroup_variable<{name}_threadgroup_t>("{name}#{line}.{index}");'
            for index, (name, dimensions) in enumerate(variables)
        ]
        pieces += [text[position:start], " ".join(references), "\n" * text.count("\n", start, end)]
        position = end
    return "".join([*pieces, text[position:]])


def _argument(parameter: str) -> str:
    """What the entry point passes for a parameter of the kernel: from ``buffers``, or of the thread ``t``."""
    attribute = re.search(r"\[\[\s*(\w+)\s*(?:\((\d+)\))?\s*\]\]", parameter)
    if not attribute:
        raise TranslationError(f"every kernel parameter should have an attribute but got {parameter!r}")
    declared = re.match(r"(.*?[\s*&])\w+\s*$", parameter[: attribute.start()].strip(), re.S)
    if not declared:
        raise TranslationError(f"a kernel parameter should have a type and a name but got {parameter!r}")
    kind, name = declared.group(1).strip(), attribute.group(1)
    if name == "buffer":
        target = kind.rstrip("*& ").strip()
        pointer = f"(({target}*)buffers[{attribute.group(2)}])"
        return f"*{pointer}" if kind.endswith("&") else pointer
    if name in SCALAR_ATTRIBUTES:
        return f"({kind})({SCALAR_ATTRIBUTES[name]})"
    if name in VECTOR_ATTRIBUTES:
        field = VECTOR_ATTRIBUTES[name]
        width = int(kind[-1]) if kind[-1] in "23" else 1
        values = ", ".join(f"t->{field}[{axis}]" for axis in range(width))
        return f"{kind}({values})"
    raise TranslationError(f"this attribute is unknown: [[{name}]]")


def translate(text: str) -> Translation:
    """Turn the text of one kernel, as MLX generates it, into C++ with an entry point.

    Raises:
        TranslationError: If the text is no such kernel.
    """
    bare = without_comments(text)
    signature = _SIGNATURE.search(bare)
    if not signature:
        raise TranslationError("the text should have one [[kernel]] function but has none")
    depth, end = 1, signature.end()
    while depth:
        depth += (bare[end] == "(") - (bare[end] == ")")
        end += 1
    arguments = [_argument(parameter) for parameter in split_top_level(bare[signature.end() : end - 1])]
    callee = signature.group(1)
    if instantiation := _INSTANTIATION.search(bare):
        callee = instantiation.group(1)
        bare = bare[: instantiation.start()] + f"\ntemplate decltype({callee}) {callee};\n"
    bare = half_literals(bare)
    entry = f"""
#define METAL_HOST_EXPORT extern "C" __attribute__((visibility("default")))
METAL_HOST_EXPORT void metal_host_bind(const metal_host::Services* services) {{ metal_host::services = services; }}
METAL_HOST_EXPORT void metal_host_entry(void* const* buffers, const metal_host::Thread* t) {{
  (void)t;
  {callee}({", ".join(arguments)});
}}
"""
    body = _replace_declarations(bare)
    return Translation(f'#line 1 "kernel"\n{body}\n#line 1 "entry"{entry}', bool(_VECTORS.search(bare)))
