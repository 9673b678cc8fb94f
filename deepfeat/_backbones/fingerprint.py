"""Digests of objects by value: equal digests mean equal behaviour, in every process.

Installed code is identified by its name and the version of its package. All other code, in a
notebook or in a module of the user, is identified by what it does: a function by its bytecode and
what it reads, a class by its bases and its attributes. So code that is changed in place gets
another digest, and code that is only moved or commented does not.
"""

import copyreg
import dis
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pickle
import site
import sys
import sysconfig
import weakref
from collections.abc import Iterable, Iterator
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph

_ATOMS = (type(None), bool, float, complex, str, bytes, type(...), type(NotImplemented))
_DESCRIPTORS = (
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    WrapperDescriptorType,
)
_PYTHON = f"{sys.implementation.name} {sys.version_info[:3]}"
# Attributes that do not affect what a class does: its location, its docs, what Python adds.
_NO_BEHAVIOUR = {
    *("__module__", "__doc__", "__annotations__", "__annotations_cache__", "__annotate_func__"),
    *("__dict__", "__weakref__", "__slotnames__", "__abstractmethods__", "_abc_impl"),
    *("__firstlineno__", "__static_attributes__", "__type_params__", "__parameters__"),
    *("__orig_bases__", "__qualname__"),
}
_MISSING = object()
_CachedFunction = type(functools.lru_cache(len))


class UnknownContentError(TypeError):
    """An object holds something that cannot be digested, such as a lock or an open file."""


def fingerprint(value: Any) -> bytes:
    """Digest a value, including its tensors and its code.

    Raises
    ------
    UnknownContentError
        If part of it cannot be digested.
    """
    try:
        return _Digester().of(value)
    except RecursionError as error:
        raise UnknownContentError(f"a {type(value).__name__} is nested too deeply") from error


class _Digester:
    """Digests the objects of one call, each once.

    An object inside itself, such as a function that calls itself, is digested by how many levels
    up it is.
    """

    def __init__(self) -> None:
        # With the objects, so that none of them is freed and its id reused.
        self._known: dict[Any, tuple[Any, bytes]] = {}
        self._path: dict[int, int] = {}

    def of(self, value: Any) -> bytes:
        if type(value) is int:  # `repr` raises for more than 4300 digits
            return _hash("int", hex(value))
        if type(value) in _ATOMS:
            return _hash(type(value).__name__, repr(value))
        key = id(value)
        if key in self._known:
            return self._known[key][1]
        if key in self._path:
            return _hash("above", str(len(self._path) - self._path[key]))
        self._path[key] = len(self._path)
        try:
            digest = _hash(*self._parts(value))
        finally:
            del self._path[key]
        self._known[key] = value, digest
        return digest

    def _of_member(self, value: Any) -> bytes:
        """Digest a member of a set as if it were the first.

        The digest of a cycle depends on where it is entered, and sets have no order.
        """
        known = self._known.copy()
        try:
            return self.of(value)
        finally:
            self._known = known

    def _parts(self, value: Any) -> Iterator[bytes | str]:
        """Yield all that affects the behaviour of an object, in a fixed order."""
        kind = type(value)
        if isinstance(value, Tensor):
            yield from ("tensor", self.of(kind), str(value.dtype), str(tuple(value.shape)))
            yield _content(value)
            if kind not in (
                Tensor,
                nn.Parameter,
            ):  # these do not use attributes that are set on them
                yield self.of(vars(value))
        elif kind is np.ndarray:
            yield from ("array", str(value.dtype.descr), str(value.shape))
            yield _hash(*map(self.of, value.flat)) if value.dtype.hasobject else value.tobytes()
        elif kind in (tuple, list):
            yield kind.__name__
            yield from map(self.of, value)
        elif kind in (set, frozenset):
            yield kind.__name__
            yield from sorted(map(self._of_member, value))
        elif kind in (dict, MappingProxyType):
            yield "dict"
            for item in list(value.items()):
                yield from map(self.of, item)
        elif isinstance(value, type):
            yield from self._of_class(value)
        elif kind is FunctionType:
            yield from self._of_function(value)
        elif kind is CodeType:
            yield from self._of_code(value)
        elif isinstance(value, ModuleType):
            yield from self._of_whole_module(value)
        elif kind is weakref.ref:  # such as those of a recurrent network to its weights
            yield from ("weakref", self.of(value()))
        else:
            yield "object"
            yield from map(self.of, (kind, *_take_apart(value)))

    def _of_class(self, value: type) -> Iterator[bytes | str]:
        yield from ("class", value.__name__)
        yield from map(self.of, (type(value), *value.__bases__))
        attributes = sorted(vars(value).items())
        module = value.__module__  # anything, for a type written in C
        origin = _find_origin(module) if isinstance(module, str) else None
        if origin and _look_up(module, value.__qualname__) is value:
            yield from (module, value.__qualname__, origin)
            # Methods that a user has replaced.
            attributes = [item for item in attributes if _is_user_function(item[1])]
        for name, attribute in attributes:
            if name not in _NO_BEHAVIOUR:
                yield from (name, self.of(attribute))

    def _of_function(self, value: FunctionType) -> Iterator[bytes | str]:
        code, module = value.__code__, value.__globals__.get("__name__", "")
        origin = _find_origin(module)
        yield "function"
        if origin:
            yield from (module, code.co_qualname, origin)
            if _look_up(module, code.co_qualname) is value:
                return
        else:
            yield self.of(code)
            yield from self._of_names(code, value.__globals__)
        yield from map(self.of, (value.__defaults__, value.__kwdefaults__, vars(value)))
        yield from map(self.of, value.__closure__ or ())

    def _of_code(self, code: CodeType) -> Iterator[bytes | str]:
        yield from ("code", _PYTHON, code.co_code, code.co_exceptiontable)
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        yield from map(self.of, (*counts, *names, *code.co_consts))

    def _of_names(self, code: CodeType, namespace: dict[str, Any]) -> Iterator[bytes | str]:
        """Yield the values of the global names that a function reads."""
        loaded, passed_on, imported, attributes = _names_in(code)
        for name in sorted(loaded):
            value = namespace.get(name, _MISSING)
            if isinstance(value, ModuleType) and name not in passed_on:
                yield from (name, self._of_module(value, attributes))
            elif value is not _MISSING:
                yield from (name, self.of(value))
        for name, level in sorted(imported):
            if level:
                package = namespace.get("__package__") or ""
                name = importlib.util.resolve_name("." * level + name, package)
            yield from self._of_import(name, attributes)

    def _of_import(self, name: str, attributes: Iterable[str]) -> Iterator[bytes | str]:
        """Yield what `import a.b` imports, for each of its packages."""
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            module = ".".join(parts[:length])
            if origin := _find_origin(module):
                yield from (module, origin)
            elif loaded := sys.modules.get(module):
                yield from (module, self._of_module(loaded, attributes))
            elif importlib.util.find_spec(module) is None:
                yield from (module, "not to be found")
                return
            else:
                raise UnknownContentError(
                    f"the module {module!r}, which a function imports, is not loaded yet"
                )

    def _of_whole_module(self, module: ModuleType) -> Iterator[bytes | str]:
        """Yield the content of a module for code that may read any of its attributes."""
        yield "module"
        if origin := _find_origin(module.__name__):
            yield from (module.__name__, origin)
            return
        for name, attribute in sorted(vars(module).items()):
            if not name.startswith("__"):
                yield from (name, self.of(attribute))

    def _of_module(self, module: ModuleType, names: Iterable[str]) -> bytes:
        """Digest an installed module by its version, and any other by some of its attributes."""
        if origin := _find_origin(module.__name__):
            return _hash("module", module.__name__, origin)
        names = frozenset(names)
        if (module, names) in self._known:  # modules that import each other are met many times
            return self._known[module, names][1]
        key = id(module)
        if key in self._path:
            return _hash("above", module.__name__)
        self._path[key] = len(self._path)
        try:
            parts: list[bytes | str] = ["module"]
            for name in sorted(names.intersection(vars(module))):
                value = vars(module)[name]
                is_module = isinstance(value, ModuleType)
                parts += [name, self._of_module(value, names) if is_module else self.of(value)]
            digest = _hash(*parts)
        finally:
            del self._path[key]
        self._known[module, names] = module, digest
        return digest


def _hash(*parts: bytes | str) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for part in parts:
        data = part.encode(errors="backslashreplace") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))  # so that parts are delimited
        digest.update(data)
    return digest.digest()


def _content(tensor: Tensor) -> bytes:
    try:
        elements = tensor.detach().cpu().contiguous().reshape(-1)
        if not len(elements):
            return b""
        array = elements.view(torch.uint8).numpy()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        layout = f"{tensor.layout} {tensor.dtype} on {tensor.device}"
        raise UnknownContentError(f"a tensor ({layout}) cannot be digested: {error}") from error
    return hashlib.blake2b(array.data, digest_size=32).digest()


def _take_apart(value: Any) -> tuple[Any, ...]:
    """Return the parts of an object, mostly as pickle would."""
    if isinstance(value, nn.Module):  # pickle refuses modules with parametrizations
        return (vars(value),)
    if isinstance(value, Graph):  # its nodes are nested as deeply as there are nodes
        code = value.python_code("self")
        return code.src, code.globals
    if isinstance(value, (set, frozenset)):  # of a subclass, which pickle would write in any order
        return frozenset(value), getattr(value, "__dict__", None)
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, BuiltinFunctionType):
        owner: Any = value.__self__
        if isinstance(owner, ModuleType):
            owner = owner.__name__, _release_of(owner.__name__, value)
        return value.__qualname__, owner
    if isinstance(value, CellType):
        try:
            return (value.cell_contents,)
        except ValueError:  # still empty
            return ()
    if isinstance(value, property):
        return value.fget, value.fset, value.fdel
    if isinstance(value, (staticmethod, classmethod)):
        return (value.__func__,)
    if isinstance(value, functools.cached_property):  # it holds a lock
        return value.func, value.attrname
    if isinstance(value, _DESCRIPTORS):
        return (value.__qualname__,)
    if isinstance(value, _CachedFunction):
        return (value.__wrapped__,)
    try:
        reduce = copyreg.dispatch_table.get(type(value))
        reduced = reduce(value) if reduce else value.__reduce_ex__(4)
    except RecursionError:
        raise
    except Exception as error:  # an object of the user may raise anything
        raise UnknownContentError(
            f"a {type(value).__name__} cannot be digested: {error}"
        ) from error
    if isinstance(reduced, str):  # the name of a global
        try:
            module: str = pickle.whichmodule(value, reduced)  # type: ignore[attr-defined]
            found = _look_up(module, reduced)
        except pickle.PicklingError:  # raised by Python 3.14
            found = None
        if found is not value:
            raise UnknownContentError(f"{reduced!r} does not have the name that it is pickled by")
        return reduced, _release_of(module, value)
    function, arguments, *rest = reduced
    rest = [list(part) if isinstance(part, Iterator) else part for part in rest]
    return function, arguments, *rest


def _release_of(module: str, value: Any) -> str:
    """Return the release of an object that can only be identified by its name."""
    if origin := _find_origin(module):
        return origin
    raise UnknownContentError(
        f"a {type(value).__name__} of the module {module!r}, which is not installed, is only known "
        "by its name"
    )


# Names ------------------------------------------------------------------------------------------


class _Names(NamedTuple):
    """The names that code reads."""

    loaded: frozenset[str]  # globals
    passed_on: frozenset[str]  # globals that are used as a whole, not just an attribute of them
    imported: frozenset[tuple[str, int]]  # modules, with the level of the import
    attributes: frozenset[str]


@functools.lru_cache(maxsize=4096)
def _names_in(code: CodeType) -> _Names:
    """Return the names that code and the functions inside it read."""
    loaded: set[str] = set()
    passed_on: set[str] = set()
    imported: set[tuple[str, int]] = set()
    attributes: set[str] = set()
    constants: list[Any] = [0, None]
    latest = None  # the global loaded by the previous instruction
    for step in dis.get_instructions(code):
        if step.opname == "EXTENDED_ARG":
            continue
        is_attribute = step.opname in ("LOAD_ATTR", "LOAD_METHOD")
        if latest is not None and not is_attribute:
            passed_on.add(latest)
        latest = None
        if step.opname.startswith("LOAD_CONST") or step.opname == "LOAD_SMALL_INT":
            constants.append(step.argval)
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            latest = step.argval
            loaded.add(latest)
        elif step.opname == "IMPORT_NAME":
            imported.add((step.argval, constants[-2]))  # the level is loaded before the names
        elif is_attribute or step.opname == "IMPORT_FROM":
            attributes.add(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _names_in(constant)
            loaded |= inner.loaded
            passed_on |= inner.passed_on
            imported |= inner.imported
            attributes |= inner.attributes
    return _Names(
        frozenset(loaded), frozenset(passed_on), frozenset(imported), frozenset(attributes)
    )


def _look_up(module: str, qualified_name: str) -> Any:
    """Return what a name in a module refers to; None if there is nothing."""
    found: Any = sys.modules.get(module)
    for name in qualified_name.split("."):
        found = getattr(found, name, None)
    return found


def _is_user_function(value: Any) -> bool:
    return isinstance(value, FunctionType) and not _find_origin(
        value.__globals__.get("__name__", "")
    )


# Origins of code --------------------------------------------------------------------------------


def _find_origin(module: str) -> str | None:
    """Return the release that a module is installed from; None for code that a user may change."""
    if not module or module in ("__main__", "__mp_main__"):
        return None
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if file is None or not os.path.isabs(file):  # an extension may make modules without a file
        top = module.partition(".")[0]
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        if spec.origin in ("built-in", "frozen"):
            return _PYTHON
        file = spec.origin or next(iter(spec.submodule_search_locations or ()), None)
    return None if file is None else _find_release(module.partition(".")[0], file)


@functools.lru_cache(maxsize=4096)
def _find_release(package: str, file: str) -> str | None:
    """Return the distribution, with version, that a file of a package was installed from."""
    sites = {os.path.realpath(path) for path in _site_folders()}
    if _lies_in(file, [sysconfig.get_path("stdlib")]) and not _lies_in(file, sites):
        return _PYTHON
    for name in _distributions().get(package, ()):
        distribution = importlib.metadata.distribution(name)
        folder = os.path.realpath(str(distribution.locate_file("")))
        # A checkout may contain metadata, too, from a build or a development install.
        is_installed = folder in sites or distribution.read_text("WHEEL") is not None
        if is_installed and _lies_in(file, [folder]):
            return f"{name} {distribution.version}"
    return None


def _site_folders() -> list[str]:
    named = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return [*named, *site.getsitepackages(), site.getusersitepackages()]


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return {
        package: sorted(set(names))
        for package, names in importlib.metadata.packages_distributions().items()
    }


def _lies_in(file: str, folders: Iterable[str]) -> bool:
    path = os.path.realpath(file)
    return any(path.startswith(os.path.realpath(folder) + os.sep) for folder in folders)
