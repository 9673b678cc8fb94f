"""Reading of layers: a forward pass that ends at the deepest requested layer."""

import copy
import functools
import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from torch import Tensor, nn

from .index import ResolvedLayer
from .trace import find_tensors, first_tensor, share_weights

Reduce: TypeAlias = Callable[[Tensor], Tensor]


class ForwardPass:
    """A forward pass that reads layers of a network and stops after the deepest of them.

    If a module is called more than once, its first output is read; if an output is a tuple, its
    first element. The hooks are registered on a copy of the modules that shares their weights, so
    that the network itself never changes, not even when a pass is interrupted. Instances are not
    thread-safe, but every thread may have its own for the same network.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    layers : mapping of str to (ResolvedLayer, callable)
        The layers to read, by any key, each with a function of its output that returns the tensor
        to keep, such as a pooled row per image.
    optional : collection of str, optional
        Keys of layers that may be missing from the result: those that the network does not call
        for a batch, or that do not return one output per image.
    originals : mapping of str to torch.nn.Module, optional
        Modules, by path, that give something else in this network, for inference, than they should:
        those that it has changed. If they are to be read, the original runs in addition.
    stops : bool, default=True
        Whether a pass stops after the deepest layer; one that is traced for an export must not.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, tuple[ResolvedLayer, Reduce]],
        optional: Collection[str] = (),
        *,
        originals: Mapping[str, nn.Module] | None = None,
        stops: bool = True,
    ):
        self.module = share_weights(module)
        self._outputs = _Outputs(layers, stops)
        self._optional = optional
        for layer in {layer.source: layer for layer, _ in layers.values()}.values():
            record = functools.partial(self._outputs.record, layer.source)
            read = self.module.get_submodule(layer.path)
            original = (originals or {}).get(layer.path)
            if layer.reads == "pre-logits":
                _read_pre_logits(read, record)
            elif layer.reads == "output" and original is not None:
                hook = functools.partial(_read_original, original, record)
                read.register_forward_pre_hook(hook, with_kwargs=True)
            elif layer.reads == "input":
                hook = functools.partial(_read_input, record)
                read.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                read.register_forward_hook(functools.partial(_read_output, record))

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        """Run a batch; return the reduced outputs by layer name.

        Raises
        ------
        ValueError
            If a layer that is not optional is not called, or does not return one output per image.
        """
        self._outputs.start()
        try:
            with suppress(_AllRead):
                self.module(batch)
            found = self._outputs.found
        finally:
            self._outputs.found = {}
        valid = {key: output for key, output in found.items() if output.shape[0] == batch.shape[0]}
        for key, layer in self._outputs.layers.items():
            if key not in valid and key not in self._optional:
                problem = "one output per image" if key in found else "a tensor"
                raise ValueError(
                    f"Layer {layer.name!r} does not return {problem} in the forward pass."
                )
        return valid


class _Outputs:
    """The outputs that hooks record in a forward pass.

    It does not refer to the modules, whose hooks refer to it, so that there is no reference cycle.
    """

    def __init__(self, layers: Mapping[str, tuple[ResolvedLayer, Reduce]], stops: bool):
        self.layers = {key: layer for key, (layer, _) in layers.items()}
        self._stops = stops
        self._reductions: dict[str, list[tuple[str, Reduce]]] = {}
        for key, (layer, reduce) in layers.items():
            self._reductions.setdefault(layer.source, []).append((key, reduce))
        self.start()

    def start(self) -> None:
        self.unread = set(self._reductions)
        self.found: dict[str, Tensor] = {}

    def record(self, source: str, output: Any) -> None:
        if source not in self.unread:
            return
        self.unread.remove(source)
        try:
            tensor = first_tensor(output)
        except TypeError:  # unlike in the trace
            return
        for key, reduce in self._reductions[source]:
            self.found[key] = _copy_if_shared(reduce(tensor), tensor)
        if self._stops and not self.unread:
            raise _AllRead


def _read_pre_logits(module: Any, record: Callable[[Any], None]) -> None:
    """Let a network of timm record what it gives its classifiers, of which it has several."""
    # Weak, so that there is no reference cycle, which would keep the weights alive.
    forward_head = weakref.WeakMethod(module.forward_head)

    def record_and_forward(features: Any, *args: Any, **options: Any) -> Any:
        forward: Any = forward_head()
        record(forward(features, pre_logits=True))
        return forward(features, *args, **options)

    module.forward_head = record_and_forward


def _read_input(
    record: Callable[[Any], None], _module: nn.Module, inputs: Any, options: Any
) -> None:
    record(next(find_tensors((inputs, options)), None))


def _read_original(
    original: nn.Module,
    record: Callable[[Any], None],
    _module: nn.Module,
    inputs: Any,
    options: Any,
) -> None:
    # It may change what it gets, which the module gets next.
    inputs, options = copy.deepcopy((inputs, options))
    record(original(*inputs, **options))


def _read_output(
    record: Callable[[Any], None], _module: nn.Module, _inputs: Any, output: Any
) -> None:
    record(output)


class _AllRead(Exception):
    """Ends a forward pass when every requested layer has been read."""


def _copy_if_shared(reduced: Tensor, output: Tensor) -> Tensor:
    """Copy a tensor that shares memory with an output, which an in-place ReLU may overwrite."""
    shared = reduced.untyped_storage()._cdata == output.untyped_storage()._cdata
    return reduced.clone() if shared else reduced
