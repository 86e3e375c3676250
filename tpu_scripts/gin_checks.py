"""What gin leaves unchecked: types, unused scopes and unbound macros, each with file and line.

The files are read a second time with gin's own parser, after gin itself has accepted them.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import importlib
import io
import os
import pathlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gin import config_parser

from r1s_jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
DYNAMIC = "from __gin__ import dynamic_registration"


def named(text: str, name: str) -> io.StringIO:
    """The text as a stream with a name, which gin quotes in its messages."""
    stream = io.StringIO(text)
    stream.name = name  # pyright: ignore[reportAttributeAccessIssue]
    return stream


def shown(path: str | os.PathLike) -> str:
    """The path as messages give it: relative to the repository where it lies inside."""
    return os.fspath(path).removeprefix(f"{ROOT}{os.sep}")


@dataclasses.dataclass(frozen=True)
class _Reference:
    name: str
    evaluated: bool
    target: Any = None

    def __repr__(self) -> str:
        return f"@{self.name}{'()' * self.evaluated}"


@dataclasses.dataclass(frozen=True)
class _Macro:
    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclasses.dataclass(frozen=True)
class Binding:
    scope: str
    owner: Any  # the class or function bound; None for a macro
    arg: str
    value: Any
    where: str

    @property
    def name(self) -> str:
        """`Class.parameter`, or a macro's name."""
        return self.arg if self.owner is None else f"{self.owner.__name__}.{self.arg}"


class _Delegate(config_parser.ParserDelegate):
    def __init__(self, resolve: Callable[[str], Any]):
        self.resolve = resolve

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Reference:
        target = self.resolve(scoped_configurable_name.rsplit("/", 1)[-1])
        return _Reference(scoped_configurable_name, evaluate, target)

    def macro(self, macro_name: str) -> _Macro:
        return _Macro(macro_name)


class Scan:
    """Reads the files a second time, after gin has, and keeps each binding with its line."""

    def __init__(self, configs: pathlib.Path):
        self.configs = configs
        self.bindings: list[Binding] = []
        self.imports: dict[str, config_parser.ImportStatement] = {}

    def import_lines(self) -> list[str]:
        return [DYNAMIC, *(statement.format() for statement in self.imports.values())]

    def read(self, text: str, where: str) -> None:
        """Reads a file; an import of an included file never hides one of the file itself."""
        imports: dict[str, config_parser.ImportStatement] = {}
        included: list[Scan] = []
        resolve = functools.partial(_resolve, imports)
        for statement in config_parser.ConfigParser(named(text, where), _Delegate(resolve)):
            if isinstance(statement, config_parser.ImportStatement):
                if not statement.module.startswith("__gin__."):
                    imports[statement.bound_name()] = statement
            elif isinstance(statement, config_parser.IncludeStatement):
                included.append(self._included(statement))
            elif isinstance(statement, config_parser.BindingStatement):
                line = f"{shown(where)}:{statement.location.line_num}"
                self.bindings.append(_bound(statement, resolve, line))
        for other in ({**imports}, *(inner.imports for inner in included)):
            for symbol, statement in other.items():
                self.imports.setdefault(symbol, statement)

    def read_binding(self, text: str) -> list[Binding]:
        """Reads what was given with --gin or --preset; returns the bindings of the text itself."""
        resolve = functools.partial(_resolve, self.imports)
        found = []
        for statement in config_parser.ConfigParser(text, _Delegate(resolve)):
            if isinstance(statement, config_parser.BindingStatement):
                found.append(_bound(statement, resolve, f"--gin {text!r}"))
            elif isinstance(statement, config_parser.IncludeStatement):
                for symbol, import_ in self._included(statement).imports.items():
                    self.imports.setdefault(symbol, import_)
        self.bindings += found
        return found

    def _included(self, statement: config_parser.IncludeStatement) -> Scan:
        inner = Scan(self.configs)
        path = self.configs / statement.filename
        inner.read(path.read_text(), str(path))
        self.bindings += inner.bindings
        return inner

    def check(self) -> None:
        """Types, macros without a value, and scopes that no reference enters."""
        macros = {
            "/".join(filter(None, (b.scope, b.arg))): b.value
            for b in self.bindings
            if b.owner is None
        }
        leaves = [(b, leaf) for b in self.bindings for leaf in _leaves(b.value)]
        for binding, leaf in leaves:
            if isinstance(leaf, _Macro) and leaf.name not in macros:
                raise UserError(f"{binding.where}: no value is bound to {leaf}")
        entered = {
            scope
            for _, leaf in leaves
            if isinstance(leaf, _Reference)
            for scope in leaf.name.split("/")[:-1]
        }
        for binding in self.bindings:
            if binding.owner is None:
                continue
            for scope in filter(None, binding.scope.split("/")):
                if scope not in entered:
                    raise UserError(f"{binding.where}: no reference @{scope}/… uses this scope")
            hint = _hints(binding.owner).get(binding.arg, Any)
            if not _fits(binding.value, hint, macros):
                wanted = hint.__name__ if isinstance(hint, type) else str(hint)
                kind = "" if isinstance(binding.value, _Reference) else type(binding.value).__name__
                raise UserError(
                    f"{binding.where}: {binding.name} expects"
                    f" {wanted.replace('typing.', '')}, found {binding.value!r} {kind}".rstrip()
                )


def _bound(
    statement: config_parser.BindingStatement, resolve: Callable[[str], Any], where: str
) -> Binding:
    scope, selector, arg, value, _ = statement
    if not arg:
        return Binding(scope, None, selector, value, where)
    return Binding(scope, resolve(selector), arg, value, where)


def _resolve(imports: dict[str, config_parser.ImportStatement], selector: str) -> Any:
    first, *rest = selector.split(".")
    statement = imports.get(first)
    if statement is None:
        return None  # gin's own names, such as gin.singleton
    named = statement.is_from or statement.alias
    found = importlib.import_module(statement.module if named else first)
    for attribute in rest:
        found = getattr(found, attribute)
    return found


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        parts: Iterable[Any] = (*value.keys(), *value.values())
    elif isinstance(value, list | tuple):
        parts = value
    else:
        yield value
        return
    for part in parts:
        yield from _leaves(part)


def _hints(owner: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(owner)
    except (NameError, TypeError):  # names imported for the type checker only
        return {}


def _fits(value: Any, hint: Any, macros: dict[str, Any]) -> bool:
    """Whether a value of a config file may be bound to a field of this type; unsure is yes."""
    if isinstance(value, _Macro):
        return _fits(macros[value.name], hint, macros)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg, macros) for arg in args)
    if origin is typing.Literal:
        return value in args
    if isinstance(value, _Reference):
        if not (value.evaluated and isinstance(value.target, type) and isinstance(hint, type)):
            return hint not in (int, float, str, bool)
        return issubclass(value.target, hint)
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    if hint is tuple or origin is tuple:
        if not isinstance(value, tuple) or not args:
            return isinstance(value, tuple)
        kinds = (args[0],) * len(value) if args[-1] is ... else args
        return len(kinds) == len(value) and all(
            _fits(part, kind, macros) for part, kind in zip(value, kinds, strict=True)
        )
    if origin in (list, collections.abc.Sequence):
        return isinstance(value, list | tuple) and all(_fits(v, args[0], macros) for v in value)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict)
    literal = isinstance(value, str | int | float | bool | tuple | list | dict) or value is None
    is_object = isinstance(hint, type) and (
        dataclasses.is_dataclass(hint) or issubclass(hint, enum.Enum)
    )
    return not (literal and is_object)
