"""`overriding`: override providers in a block, and rebuild their dependents."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

from dependency_injector import containers, providers

from sessionwire._config.keys import did_you_mean
from sessionwire.errors import ConfigurationError

C = TypeVar("C", bound=containers.Container | type[containers.Container])


@contextmanager
def overriding(container: C, /, **values: object) -> Generator[C]:
    """Override providers by name, as in `overriding(container, clock=FakeClock())`.

    Singletons that depend on an overridden provider are rebuilt inside the block, and
    have their previous object again after it; the others keep theirs. Dependencies are
    those declared in the container, not those that a constructor looks up by itself;
    therefore every singleton first built inside the block is reset at its end. Close
    inside the block what you open there.

    Args:
        container: The container, or its class.
        **values: A provider, or the object to provide, by the name of the provider that
            it overrides. Two underscores lead into a nested container.

    Raises:
        ConfigurationError: A name belongs to no provider. Nothing is overridden then.
    """
    known = providers_by_name(container)
    for name in values:
        if name not in known:
            raise _unknown_provider_error(name, container, known)
    before = {provider: provider.overridden for provider in known.values()}
    with ExitStack() as stack:
        for name, value in values.items():
            nested = [other for other in known if other.startswith(f"{name}__")]
            # last in, first out: a container is restored before those nested in it
            for restored in (*reversed(nested), name):
                stack.callback(_restore_overrides, known[restored], before[known[restored]])
            known[name].override(value)
        changed = {
            provider for provider in known.values() if provider.overridden != before[provider]
        }
        for singleton in list(cast(Any, container).traverse(types=[providers.BaseSingleton])):
            if singleton.overridden:
                continue
            if changed.isdisjoint(map(_overridable, singleton.traverse())):
                stack.enter_context(_reset_if_built(singleton))
            else:
                stack.callback(_restore_overrides, singleton, ())
                singleton.override(_fresh_copy(singleton))
        yield container


def providers_by_name(container: Any, prefix: str = "") -> dict[str, Any]:
    """Return all providers of a container, those of nested ones as `outer__inner`."""
    found: dict[str, Any] = {}
    for name, provider in container.providers.items():
        found[prefix + name] = provider
        if isinstance(provider, providers.Container | providers.DependenciesContainer):
            found |= providers_by_name(provider, f"{prefix}{name}__")
    return found


def _overridable(provider: Any) -> Any:
    """Return the provider that overrides apply to: of an option, its configuration."""
    return provider._get_root() if isinstance(provider, providers.ConfigurationOption) else provider


def _fresh_copy(singleton: Any) -> Any:
    """Return a singleton with equal dependencies that has not built its object."""
    copy = type(singleton)()
    copy.set_provides(singleton.provides)
    return (
        copy.set_args(*singleton.args)
        .set_kwargs(**singleton.kwargs)
        .set_attributes(**singleton.attributes)
    )


@contextmanager
def _reset_if_built(singleton: Any) -> Generator[None]:
    """Reset the singleton at the end if it was built inside.

    It does not record that itself, so its factory is wrapped.
    """
    provides, is_built = singleton.provides, False

    def build(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_built
        is_built = True
        return provides(*args, **kwargs)

    if singleton.provided_type is None:  # a singleton of a given type accepts no function
        singleton.set_provides(build)
    try:
        yield
    finally:
        singleton.set_provides(provides)
        if is_built:
            singleton.reset()


def _restore_overrides(provider: Any, before: tuple[Any, ...]) -> None:
    """Remove all overrides added inside the block, by whomever.

    Re-apply one that resetting a nested container removed by mistake.
    """
    while len(provider.overridden) > len(before):
        provider.reset_last_overriding()
    for lost in before[len(provider.overridden) :]:
        provider.override(lost)


def _unknown_provider_error(name: str, container: Any, known: dict[str, Any]) -> ConfigurationError:
    hint = did_you_mean(name, known)
    suggestion = f": {hint}" if hint else "."
    owner = container.parent_name or type(container).__name__
    names = ", ".join(sorted(known))
    return ConfigurationError(f"{owner} has no provider {name!r}{suggestion} It has {names}")
