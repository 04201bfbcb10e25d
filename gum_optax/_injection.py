"""Lets ``optax.inject_hyperparams`` handle factories that have structural arguments.

``inject_hyperparams`` sorts a factory's arguments by type: numbers become arrays in the state, and
callables become schedules. That is right for a learning rate and wrong for a rank (it decides
shapes), a projector or a mask (they are functions, not schedules). optax asks every user to list
such arguments in ``static_args``; here the factory says so itself.

``inject_hyperparams`` binds arguments through ``inspect.signature(factory)``. The signature given
to it puts every structural argument into a box that is neither a number nor a callable, and the
factory takes it out again.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import optax

from gum_optax._typing import PyTree

_Factory = TypeVar("_Factory", bound=Callable[..., Any])


class _Structural(NamedTuple):
    value: Any


class _BoxingSignature(inspect.Signature):
    injectable: frozenset[str] = frozenset()

    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if name not in self.injectable:
                bound.arguments[name] = _Structural(value)
        return bound


def injectable(*names: str) -> Callable[[_Factory], _Factory]:
    """Declares which arguments of a factory ``optax.inject_hyperparams`` may make dynamic."""

    def decorate(factory: _Factory) -> _Factory:
        plain = inspect.signature(factory)
        signature = _BoxingSignature(
            list(plain.parameters.values()), return_annotation=plain.return_annotation
        )
        signature.injectable = frozenset(names)

        @functools.wraps(factory)
        def unboxing(*args: Any, **kwargs: Any) -> Any:
            return factory(*map(_unbox, args), **{k: _unbox(v) for k, v in kwargs.items()})

        unboxing.__signature__ = signature  # type: ignore[attr-defined]
        return unboxing  # type: ignore[return-value]

    return decorate


def handing_over(
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs],
    make_base: Callable[..., optax.GradientTransformation],
    **hyperparameters: Any,
) -> optax.GradientTransformationExtraArgs:
    """``wrap(make_base(**hyperparameters))``, which hands the hyperparameters over at each update.

    An injected hyperparameter is a traced array. On Explicit mesh axes its type names the mesh, and
    the engine changes that of all that it computes with (see `_mesh.in_auto_mode`): of what it is
    handed, not of what a base closes over.
    """
    init = make_base(**hyperparameters).init  # made at once, so that bad values raise at once

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        base_hyperparameters: dict[str, Any],
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        del extra_args
        return make_base(**base_hyperparameters).update(updates, state, params)

    base: Any = optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
    wrapped = wrap(base)

    def wrapped_update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        return wrapped.update(
            updates, state, params, base_hyperparameters=hyperparameters, **extra_args
        )

    return optax.GradientTransformationExtraArgs(wrapped.init, wrapped_update)


def _unbox(value: Any) -> Any:
    return value.value if isinstance(value, _Structural) else value
