"""The callbacks of scikit-learn, from 1.9 on, with one task per epoch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])

try:
    from sklearn import callback
except ImportError:
    callback = None


class _NoCallbacks:
    """What stands in for scikit-learn's mixin in releases without callbacks."""

    def _init_callback_context(self, **_: Any) -> "_Unwatched":
        return _Unwatched()


class _Unwatched:
    """A task of which nobody is told."""

    def subcontext(self, **_: Any) -> "_Unwatched":
        return self

    def call_on_fit_task_begin(self, **_: Any) -> None:
        pass

    def call_on_fit_task_end(self, **_: Any) -> bool:
        return False


CallbackSupport: type = _NoCallbacks if callback is None else callback.CallbackSupportMixin


def with_callbacks(method: Method) -> Method:
    """Let a method tear callbacks down in the end; a call has one frame more, also without any."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    managed: Any = call if callback is None else callback.with_callbacks(method)
    return cast(Method, managed)


class Tasks:
    """The tasks of a fit of which callbacks are told: the whole of it, and its epochs.

    `data` has X, y and metadata; `find_fitted` returns the attributes that make a copy of the
    estimator a fitted one.
    """

    def __init__(
        self,
        estimator: Any,
        epochs: int,
        data: Mapping[str, Any],
        find_fitted: Callable[[], dict[str, Any]],
    ):
        self._hooks = {"estimator": estimator, **data}
        self._find_fitted = find_fitted
        self._fit = estimator._init_callback_context(max_subtasks=epochs)
        self._fit.call_on_fit_task_begin(**self._hooks)

    def begin_epoch(self) -> None:
        """Tell of the beginning of an epoch."""
        self._epoch = self._fit.subcontext(task_name="epoch")
        self._epoch.call_on_fit_task_begin(**self._hooks)

    def end_epoch(self) -> bool:
        """Tell of the end of an epoch; return whether it is to be the last."""
        return bool(
            self._epoch.call_on_fit_task_end(
                **self._hooks, reconstruction_attributes=self._find_fitted
            )
        )

    def end(self) -> None:
        """Tell of the end of the fit."""
        self._fit.call_on_fit_task_end(**self._hooks, reconstruction_attributes={})
