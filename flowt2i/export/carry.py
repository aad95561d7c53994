"""Python files that run where flowt2i is not installed: our own text, with what it takes from flowt2i written into it."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

OURS = re.compile(r"^from (flowt2i[\w.]*) import ([\w, ]+)\n", re.MULTILINE)


def self_contained(path: Path, replaced: dict[str, str] | None = None) -> str:
    """The text of a module in which every `from flowt2i… import f` is replaced by the text of f and all that f needs.

    replaced: module name -> text that takes the place of imports from it. Functions, classes, constants and regular expressions can be carried,
    what other packages define is imported; ValueError for anything else.
    """
    done: dict[str, str] = {}

    def put(found: re.Match[str]) -> str:
        module, names = found[1], found[2].split(",")
        if replaced and module in replaced:
            return replaced[module]
        before = set(done)
        owner = importlib.import_module(module)
        for name in names:
            _carry(name.strip(), getattr(owner, name.strip()), done)
        return _layout([text for name, text in done.items() if name not in before])

    text = OURS.sub(put, path.read_text())
    if re.search(r"^\s*(import|from) flowt2i", text, re.MULTILINE):
        raise ValueError(f"{path} still imports flowt2i: write its imports as `from flowt2i.… import name`")
    return text


def _carry(name: str, value: Any, done: dict[str, str]) -> None:
    """Add the source text of a name to `done`, what it needs before it."""
    if name in done:
        return
    origin = getattr(value, "__module__", None)
    if isinstance(value, ModuleType):
        done[name] = f"import {value.__name__}" + ("" if value.__name__ == name else f" as {name}")
    elif isinstance(value, re.Pattern):
        _carry("re", re, done)
        done[name] = f"{name} = re.compile({value.pattern!r})"
    elif isinstance(value, str | int | float | tuple):
        done[name] = f"{name} = {value!r}"
    elif isinstance(origin, str) and origin.split(".")[0] != "flowt2i":
        done[name] = f"from {origin} import {name}"
    elif isinstance(value, FunctionType | type):
        source, around = inspect.getsource(value), vars(sys.modules[value.__module__])
        names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}  # annotations' too
        for need in sorted(names & around.keys() - {name}):
            _carry(need, around[need], done)
        done[name] = source.rstrip()
    else:
        raise ValueError(f"{name} cannot be carried along: it is {type(value).__name__}")


def _layout(texts: list[str]) -> str:
    """Imports, constants, functions and classes."""
    imports = sorted(t for t in texts if t.startswith(("import ", "from ")))
    functions = [t for t in texts if t.startswith(("def ", "class ", "@"))]
    constants = [t for t in texts if t not in imports and t not in functions]
    return "\n".join(imports) + "\n\n" + "\n".join(constants) + "\n\n\n" + "\n\n\n".join(functions) + "\n"
