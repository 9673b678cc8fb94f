"""Digests by value: equal behaviour has equal digests, different behaviour different ones."""

import copy
import importlib
import itertools
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision import models
from torchvision.transforms import v2

from deepfeat._backbones.fingerprint import UnknownContentError, fingerprint

numbers = itertools.count()

# Source code, the object that is digested, and a statement that changes its behaviour in place.
CHANGES = {
    "a global": ("k = 2\ndef f(x): return k * x", "m.f", "m.k = 3"),
    "a global in a comprehension": (
        "k = 2\ndef f(x): return [k for _ in x]",
        "m.f",
        "m.k = 3",
    ),
    "a global in a nested function": (
        "k = 2\ndef f(x):\n    def g(): return k\n    return g() * x",
        "m.f",
        "m.k = 3",
    ),
    "a global in a nested class": (
        "k = 2\ndef f(x):\n    class C:\n        j = k\n    return C.j * x",
        "m.f",
        "m.k = 3",
    ),
    "a global that was not there": ("def f(x): return k * x", "m.f", "m.k = 3"),
    "a builtin that a global hides": ("def f(x): return len(x)", "m.f", "m.len = lambda x: 7"),
    "a global list, in place": ("k = [1, 2]\ndef f(x): return k", "m.f", "m.k.append(3)"),
    "a global dict, in place": ("k = dict(a=2)\ndef f(x): return k", "m.f", "m.k['a'] = 3"),
    "a global set, in place": ("k = set((1, 2))\ndef f(x): return k", "m.f", "m.k.add(3)"),
    "a global array, in place": (
        "import numpy as np\nk = np.zeros(3)\ndef f(x): return k",
        "m.f",
        "m.k[1] = 3",
    ),
    "a global tensor, in place": (
        "import torch\nk = torch.zeros(3)\ndef f(x): return k",
        "m.f",
        "m.k[1] = 3",
    ),
    "an attribute of a global": (
        "class C: pass\nk = C()\nk.j = 2\ndef f(x): return k.j * x",
        "m.f",
        "m.k.j = 3",
    ),
    "a default": ("def f(x, k=2): return k * x", "m.f", "m.f.__defaults__ = (3,)"),
    "a keyword default": (
        "def f(x, *, k=2): return k * x",
        "m.f",
        "m.f.__kwdefaults__['k'] = 3",
    ),
    "the code": (
        "def f(x): return 2 * x\ndef g(x): return 3 * x",
        "m.f",
        "m.f.__code__ = m.g.__code__",
    ),
    "a constant alone": (
        "def f(x): return 1 * x\ndef g(x): return True * x",
        "m.f",
        "m.f.__code__ = m.g.__code__",
    ),
    "an attribute of a function": ("def f(x): return f.k * x\nf.k = 2", "m.f", "m.f.k = 3"),
    "what is called": ("def g(x): return 2\ndef f(x): return g(x)", "m.f", "m.g = lambda x: 3"),
    "what that calls": (
        "def h(x): return 2\ndef g(x): return h(x)\ndef f(x): return g(x)",
        "m.f",
        "m.h = lambda x: 3",
    ),
    "the code of what is called": (
        "def g(x): return 2\ndef h(x): return 3\ndef f(x): return g(x)",
        "m.f",
        "m.g.__code__ = m.h.__code__",
    ),
    "the closure of a decorator": (
        "def times(k):\n    def wrap(f):\n        def g(x): return k * f(x)\n        return g\n"
        "    return wrap\n@times(2)\ndef f(x): return x",
        "m.f",
        "dict(zip(m.f.__code__.co_freevars, m.f.__closure__))['k'].cell_contents = 3",
    ),
    "what a decorator wraps": (
        "import functools\ndef g(x): return 2\ndef wrap(f):\n    @functools.wraps(f)\n"
        "    def h(x): return f(x)\n    return h\nf = wrap(g)",
        "m.f",
        "m.g.__code__ = (lambda x: 3).__code__",
    ),
    "what an installed decorator wraps": (
        "import torch\nk = 2\n@torch.no_grad()\ndef f(x): return k * x",
        "m.f",
        "m.k = 3",
    ),
    "what lru_cache wraps": (
        "import functools\nk = 2\n@functools.lru_cache\ndef f(x): return k * x",
        "m.f",
        "m.k = 3",
    ),
    "an argument of a partial": (
        "import functools\ndef g(k, x): return k[0] * x\nf = functools.partial(g, [2])",
        "m.f",
        "m.f.args[0][0] = 3",
    ),
    "the function of a partial": (
        "import functools\nj = 2\ndef g(k, x): return j\nf = functools.partial(g, 1)",
        "m.f",
        "m.j = 3",
    ),
    "a class attribute": (
        "class C:\n    k = 2\n    def f(self): return self.k",
        "m.C()",
        "m.C.k = 3",
    ),
    "a class attribute, in place": (
        "class C:\n    k = [2]\n    def f(self): return self.k",
        "m.C()",
        "m.C.k.append(3)",
    ),
    "a method": ("class C:\n    def f(self): return 2", "m.C()", "m.C.f = lambda self: 3"),
    "a method that is added": ("class C: pass", "m.C()", "m.C.__call__ = lambda self: 3"),
    "a method of one object": (
        "class C:\n    def f(self): return 2",
        "m.C()",
        "x.f = __import__('types').MethodType(lambda self: 3, x)",
    ),
    "a bound method": (
        "class C:\n    k = 2\n    def f(self): return self.k",
        "m.C().f",
        "m.C.k = 3",
    ),
    "a global that a method reads": (
        "k = 2\nclass C:\n    def f(self): return k",
        "m.C()",
        "m.k = 3",
    ),
    "a method of a base": (
        "class B:\n    def f(self): return 2\nclass C(B): pass",
        "m.C()",
        "m.B.f = lambda self: 3",
    ),
    "the bases": (
        "class A:\n    def f(self): return 2\nclass B:\n    def f(self): return 3\n"
        "class C(A): pass",
        "m.C()",
        "m.C.__bases__ = (m.B,)",
    ),
    "the class of an object": (
        "class A:\n    def f(self): return 2\nclass B:\n    def f(self): return 3\nx = A()",
        "m.x",
        "m.x.__class__ = m.B",
    ),
    "a method of the metaclass": (
        "class M(type):\n    def f(cls): return 2\nclass C(metaclass=M): pass",
        "m.C",
        "m.M.f = lambda cls: 3",
    ),
    "a property": (
        "class C:\n    @property\n    def f(self): return 2",
        "m.C()",
        "m.C.f = property(lambda self: 3)",
    ),
    "a global that a property reads": (
        "k = 2\nclass C:\n    @property\n    def f(self): return k",
        "m.C()",
        "m.k = 3",
    ),
    "a cached property": (
        "import functools\nk = 2\nclass C:\n    @functools.cached_property\n"
        "    def f(self): return k",
        "m.C()",
        "m.k = 3",
    ),
    "a static method": (
        "k = 2\nclass C:\n    @staticmethod\n    def f(): return k",
        "m.C()",
        "m.k = 3",
    ),
    "a class method": (
        "k = 2\nclass C:\n    @classmethod\n    def f(cls): return k",
        "m.C()",
        "m.k = 3",
    ),
    "a descriptor": (
        "class D:\n    k = 2\n    def __get__(self, *_): return self.k\nclass C:\n    f = D()",
        "m.C()",
        "m.D.k = 3",
    ),
    "a slot": ("class C:\n    __slots__ = ('k',)\nx = C()\nx.k = 2", "m.x", "m.x.k = 3"),
    "an attribute of an attribute": (
        "class C: pass\nx = C()\nx.c = C()\nx.c.k = 2",
        "m.x",
        "m.x.c.k = 3",
    ),
    "the class of an attribute": (
        "class D:\n    k = 2\nclass C: pass\nx = C()\nx.d = D()",
        "m.x",
        "m.D.k = 3",
    ),
    "a default of a dataclass": (
        "import dataclasses\n@dataclasses.dataclass\nclass C:\n    k: list = dataclasses.field("
        "default_factory=lambda: [j])\nj = 2\ndef f(x): return C()",
        "m.f",
        "m.j = 3",
    ),
    "a method of an enumeration": (
        "import enum\nclass E(enum.Enum):\n    A = 1\n    def f(self): return 2",
        "m.E.A",
        "m.E.f = lambda self: 3",
    ),
    "what an abstract class brings": (
        "import abc\nclass B(abc.ABC):\n    k = 2\n    @abc.abstractmethod\n    def f(self): ...\n"
        "class C(B):\n    def f(self): return self.k",
        "m.C()",
        "m.B.k = 3",
    ),
    "a global of a module": (
        "import {other}\ndef f(x): return {other}.k * x",
        "m.f",
        "other.k = 3",
    ),
    "a function of a module": (
        "import {other}\ndef f(x): return {other}.g(x)",
        "m.f",
        "other.k = 3",
    ),
    "a module imported under another name": (
        "import {other} as o\ndef f(x): return o.g(x)",
        "m.f",
        "other.k = 3",
    ),
    "a module imported inside": (
        "def f(x):\n    import {other}\n    return {other}.k * x",
        "m.f",
        "other.k = 3",
    ),
    "a function imported inside": (
        "def f(x):\n    from {other} import g\n    return g(x)",
        "m.f",
        "other.k = 3",
    ),
    "a module of a module": (
        "import {package}.sub\ndef f(x): return {package}.sub.k * x",
        "m.f",
        "sub.k = 3",
    ),
    "a module of a package imported inside": (
        "def f(x):\n    from {package} import sub\n    return sub.k * x",
        "m.f",
        "sub.k = 3",
    ),
    "a neighbour imported inside": ("", "package.f", "sub.k = 3"),
    "a module that is passed on": (
        "import {other}\ndef h(m, x): return m.g(x)\ndef f(x): return h({other}, x)",
        "m.f",
        "other.k = 3",
    ),
    "a module whose attribute is read by name": (
        "import {other}\ndef f(x): return getattr({other}, 'g')(x)",
        "m.f",
        "other.k = 3",
    ),
    "a module of a package in a closure": (
        "import {package}.sub\ndel {package}.f\ndef wrap(p):\n"
        "    return lambda x: p.sub.g(x)\nf = wrap({package})",
        "m.f",
        "sub.k = 3",
    ),
    "a module of a package as an attribute": (
        "import {package}.sub\ndel {package}.f\nclass C:\n"
        "    def __call__(self, x): return self.p.sub.g(x)\nx = C()\nx.p = {package}",
        "m.x",
        "sub.k = 3",
    ),
    "an attribute of a tensor": (
        "import torch\nclass C(torch.Tensor): pass\nx = torch.ones(2).as_subclass(C)\nx.k = 2",
        "m.x",
        "m.x.k = 3",
    ),
    "a module as an attribute": (
        "import {other}\nclass C: pass\nx = C()\nx.o = {other}",
        "m.x",
        "other.k = 3",
    ),
    "a method of an installed class": (
        "import torch\nx = torch.nn.Sequential(torch.nn.Hardswish())",
        "m.x",
        "patch(torch.nn.Hardswish, 'forward', lambda self, x: x)",
    ),
    "a method that an installed class inherits": (
        "import torch\nx = torch.nn.Hardswish()",
        "m.x",
        "patch(torch.nn.Module, 'half', lambda self: self)",
    ),
    "a parameter": ("import torch\nx = torch.nn.Linear(2, 2)", "m.x", "m.x.weight.data[0] += 1"),
    "a buffer": ("import torch\nx = torch.nn.BatchNorm1d(2)", "m.x", "m.x.running_mean[0] += 1"),
    "a hook": (
        "import torch\nx = torch.nn.Linear(2, 2)",
        "m.x",
        "m.x.register_forward_hook(lambda *_: None)",
    ),
    "what a hook reads": (
        "import torch\nk = 2\nx = torch.nn.Linear(2, 2)\nx.register_forward_hook(lambda *_: k)",
        "m.x",
        "m.k = 3",
    ),
    "the order of layers": (
        "import torch\na, b = torch.nn.ReLU(), torch.nn.Tanh()\nx = torch.nn.Sequential(a, b)",
        "m.x",
        "m.x[0], m.x[1] = m.b, m.a",
    ),
    "an argument of a layer": (
        "import torch\nx = torch.nn.LeakyReLU(0.1)",
        "m.x",
        "m.x.negative_slope = 0.2",
    ),
}


@pytest.fixture
def user_code(tmp_path, monkeypatch):
    """Import a module from source; return it, another module, a package and its submodule."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(source):
        number = next(numbers)
        names = {name: f"{name}_{number}" for name in ("main", "other", "package")}
        folder = tmp_path / names["package"]
        folder.mkdir()
        for file, text in (
            (tmp_path / f"{names['main']}.py", source.format_map(names)),
            (tmp_path / f"{names['other']}.py", "k = 2\ndef g(x): return k * x\n"),
            (folder / "__init__.py", "def f(x):\n    from .sub import g\n    return g(x)\n"),
            (folder / "sub.py", "k = 2\ndef g(x): return k * x\n"),
        ):
            file.write_text(text)
        importlib.invalidate_caches()
        modules = [importlib.import_module(name) for name in names.values()]
        return (*modules, importlib.import_module(f"{names['package']}.sub"))

    return load


@pytest.mark.parametrize("change", CHANGES)
def test_different_behaviour_has_a_different_digest(change, user_code, monkeypatch):
    """Code and data that change in place are noticed, wherever they are."""
    source, subject, statement = CHANGES[change]
    m, other, package, sub = user_code(
        source.replace("{1: 2}", "dict([(1, 2)])").replace("{1, 2}", "set([1, 2])")
    )
    names = {"m": m, "other": other, "package": package, "sub": sub, "torch": torch}
    x = eval(subject, names)
    before = fingerprint(x)
    assert fingerprint(x) == before
    exec(statement, names | {"x": x, "patch": monkeypatch.setattr})
    assert fingerprint(x) != before


SOURCE = """
import collections, dataclasses, enum, functools
import numpy as np
import torch
from torch import nn

NAMES = {"red", "green", "blue", "yellow"}
TABLE = {name: len(name) for name in ("b", "a")}
SIDES = frozenset({"left", "right", "up"})

class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"

@dataclasses.dataclass(frozen=True)
class Size:
    height: int = 3
    names: frozenset = SIDES

Pair = collections.namedtuple("Pair", "left right")

def is_even(n):
    return True if n == 0 else is_odd(n - 1)

def is_odd(n):
    return False if n == 0 else is_even(n - 1)

class Words(set):
    pass

class Block(nn.Module):
    sizes = Size(4)
    kinds = {Color.RED, Color.BLUE}
    words = Words(["one", "two", "three", "four"])

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        nn.init.ones_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.pair = Pair({"x", "y", "z"}, np.arange(3))

    def forward(self, x):
        if x.shape[0] in {"one", "two", "three"} or TABLE:
            return self.scale(x) * is_even(4)
        return [name for name in NAMES if name not in {"a", "c", "b"}]

    @functools.cached_property
    def later(self):
        return functools.partial(is_odd, 3)

    def scale(self, x):
        return (lambda y: self.linear(y) + len(SIDES))(x)
"""


@pytest.fixture(scope="module")
def digests(tmp_path_factory):
    """Digests in three processes, of the code of their script and of the same in a module."""
    folder = tmp_path_factory.mktemp("code")
    digests = {"__main__": set(), "a module": set()}
    for seed in range(3):
        (folder / f"file_{seed}.py").write_text("# a comment\n\n" * seed + SOURCE)
        script = (folder / f"file_{seed}.py").read_text() + textwrap.dedent(f"""
            import sys, file_{seed}
            from deepfeat._backbones.fingerprint import fingerprint
            for module in sys.modules["__main__"], file_{seed}:
                print(fingerprint((module.Block(), module.is_odd, module.NAMES)).hex())
            """)
        run = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(folder)},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, digest in zip(digests, run.stdout.split(), strict=True):
            digests[name].add(digest)
    return digests


@pytest.mark.parametrize("name", ["__main__", "a module"])
def test_a_digest_is_the_same_in_every_process(name, digests):
    """Three processes agree, whatever the hash seed, the name of the file and the line numbers."""
    assert len(digests[name]) == 1


def test_comments_and_locations_are_not_behaviour(user_code):
    """A function that moves to another line of another file, with comments, stays the same."""
    one, *_ = user_code("def f(x):\n    return 2 * x")
    other, *_ = user_code("k = 2\n\n\ndef f(x):\n    # twice\n\n    return 2 * x")
    assert fingerprint(one.f) == fingerprint(other.f)


def named_networks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            models.squeezenet1_1(weights=None),
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        ]


@pytest.mark.parametrize("number", range(2))
def test_a_copy_has_the_digest_of_its_original(number):
    """Deep copies, such as those that `clone` makes, are equal."""
    network = named_networks()[number]
    assert fingerprint(copy.deepcopy(network)) == fingerprint(network)


def test_copies_of_a_parametrized_layer_have_one_digest():
    """Pickle refuses such a layer; its class refers to the original, unlike those of copies."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    one, other = copy.deepcopy(layer), copy.deepcopy(layer)
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        other.parametrizations.weight.original1.mul_(2)
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(
    "value",
    [
        models.ResNet50_Weights.DEFAULT.transforms(),
        v2.Compose([v2.Resize(8), v2.ToDtype(torch.float32, scale=True)]),
        v2.functional.resize,
        np.arange(6).reshape(2, 3),
        np.array(["a", None, 1.0], dtype=object),
        torch.float32,
        torch.device("cpu"),
        len,
        torch.relu,
        np.add,
        np.random.default_rng(0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_pickle_has_the_digest_of_its_original(value):
    """Objects of installed packages are identified by name."""
    assert fingerprint(pickle.loads(pickle.dumps(value))) == fingerprint(value)


def test_installed_code_is_identified_by_its_release(monkeypatch):
    """The same transform of another release of torchvision is a different one."""
    from deepfeat._backbones import fingerprint as _fingerprint

    transform = v2.Resize(8)
    before = fingerprint(transform)
    find = _fingerprint._find_release
    monkeypatch.setattr(
        _fingerprint,
        "_find_release",
        lambda package, file: "another" if package == "torchvision" else find(package, file),
    )
    assert fingerprint(transform) != before


@pytest.mark.parametrize("installer", ["wheel", "checkout"])
def test_a_checkout_is_not_an_installed_package(installer, tmp_path, monkeypatch):
    """A development install, with metadata beside its code, is not identified by its version."""
    from deepfeat._backbones import fingerprint as _fingerprint

    (tmp_path / "mine_1").mkdir()
    (tmp_path / "mine_1" / "__init__.py").write_text("k = 2\ndef f(x): return k * x")
    kind = "dist-info" if installer == "wheel" else "egg-info"
    metadata = tmp_path / f"mine_1-1.0.{kind}"
    metadata.mkdir()
    for name in ("METADATA", "PKG-INFO"):
        (metadata / name).write_text("Metadata-Version: 2.1\nName: mine_1\nVersion: 1.0\n")
    (metadata / "top_level.txt").write_text("mine_1\n")
    if installer == "wheel":
        (metadata / "WHEEL").write_text("Wheel-Version: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    _fingerprint._distributions.cache_clear()
    try:
        mine = importlib.import_module("mine_1")
        before = fingerprint(mine.f)
        mine.k = 3
        assert (fingerprint(mine.f) == before) == (installer == "wheel")
    finally:
        _fingerprint._distributions.cache_clear()
        _fingerprint._find_release.cache_clear()
        sys.modules.pop("mine_1", None)


def test_a_traced_network_of_any_length_has_a_digest():
    """The nodes of its graph refer to each other, and are nested as deeply as there are nodes."""
    layers = nn.Sequential(*(nn.Linear(1, 1) for _ in range(300)))
    one, same, other = map(torch.fx.symbolic_trace, (layers, layers, layers[:-1]))
    assert fingerprint(same) == fingerprint(one) != fingerprint(other)
    before = fingerprint(one)
    with torch.no_grad():
        layers[7].bias.add_(1)
    assert fingerprint(one) != before


def test_an_integer_of_any_length_has_a_digest():
    """Python refuses to write integers of more than 4,300 digits in decimal."""
    assert fingerprint(1 << 20_000) != fingerprint(1 << 20_001)


def test_modules_that_import_each_other_are_digested_once():
    """There are too many paths through them to follow each."""
    modules = [types.ModuleType(f"friend_{number}") for number in range(20)]
    for module in modules:
        vars(module).update({friend.__name__: friend for friend in modules})
    before = fingerprint(modules[0])
    modules[7].k = 1
    assert fingerprint(modules[0]) != before


def looped():
    items = [1]
    items.append(items)
    return items


class Parent(nn.Module):
    """A module whose child refers to it, which torch allows inside a list."""

    def __init__(self):
        super().__init__()
        self.child = nn.Identity()
        self.child.parent = [self]


@pytest.mark.parametrize("make", [looped, Parent])
def test_an_object_that_contains_itself_has_a_digest(make):
    """A cycle ends, and everything around it counts."""
    assert fingerprint(make()) == fingerprint(make())
    assert fingerprint((make(), 1)) != fingerprint((make(), 2))


def open_file():
    return open(os.devnull)


def waiting_import():
    def function(x):
        import this_is_not_loaded_yet

        return this_is_not_loaded_yet.f(x)

    return function


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (threading.Lock, "a lock cannot be digested"),
        (open_file, "a TextIOWrapper cannot be digested"),
        (lambda: (item for item in ()), "a generator cannot be digested"),
        (lambda: torch.zeros(3).to_sparse(), "sparse"),
        (lambda: torch.zeros(3, device="meta"), "meta"),
        (waiting_import, "'this_is_not_loaded_yet', which a function imports, is not loaded yet"),
        (lambda: nest(100_000), "nested too deeply"),
        (lambda: np.frompyfunc(abs, 1, 1), "does not have the name that it is pickled by"),
    ],
)
def test_an_object_that_cannot_be_digested_is_named(make, words, tmp_path, monkeypatch):
    """A lock, a file or code that is not loaded yet has no digest, alone or inside another."""
    (tmp_path / "this_is_not_loaded_yet.py").write_text("def f(x): return x")
    monkeypatch.syspath_prepend(tmp_path)
    value = make()
    for holder in (value, [value], types.SimpleNamespace(x=value)):
        with pytest.raises(UnknownContentError, match=words):
            fingerprint(holder)
    getattr(value, "close", int)()


def nest(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


atoms = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.binary(max_size=5)
)
hashable = st.recursive(atoms, lambda inner: st.tuples(inner) | st.frozensets(inner), max_leaves=5)
values = st.recursive(
    hashable,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(hashable, inner),
    max_leaves=20,
)


def spell(value):
    """Represent a value such that equal representations mean equal values of equal types."""
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [spell(item) for item in value]
    if isinstance(value, frozenset):
        return "frozenset", sorted(repr(spell(item)) for item in value)
    if isinstance(value, dict):
        return "dict", [(spell(key), spell(item)) for key, item in value.items()]
    return type(value).__name__, repr(value)


@given(values, values)
def test_digests_are_equal_if_values_are(one, other):
    """1, 1.0 and True differ, as do 0.0 and -0.0, or a list and a tuple; sets have no order."""
    assert (fingerprint(one) == fingerprint(other)) == (spell(one) == spell(other))
    assert fingerprint(copy.deepcopy(one)) == fingerprint(one)


def test_tensors_of_one_content_and_two_types_have_different_digests():
    """The bytes of zeros are the same as integers and as floats."""
    one, other = torch.zeros(3), torch.zeros(3, dtype=torch.int32)
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(torch.zeros(3))
