"""`overriding`: several providers of a container overridden in one block, and what depends on them built anew."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any, TypeVar, cast

from dependency_injector import containers, providers

from sessionwire.errors import ConfigurationError

C = TypeVar("C", bound=containers.Container | type[containers.Container])


@contextmanager
def overriding(container: C, /, **values: object) -> Generator[C]:
    """Override providers by name inside the block, as in `overriding(container, clock=FakeClock(), db__session=fake)`.

    A value is a provider, or else what one is to provide. Two underscores lead into a nested container. A singleton
    that depends on what is overridden is built anew inside the block, and after it has its object from before, if it
    had one; all others keep theirs. What depends on what is as the container knows it, not what a constructor looks up
    by itself: therefore any singleton that was first built inside is reset at the end. Close inside what opens inside.

    Raises `ConfigurationError` where there is no provider of a name; nothing is overridden then.
    """
    known = by_name(container)
    for name in values:
        if name not in known:
            raise _unknown(name, container, known)
    before = {provider: provider.overridden for provider in known.values()}
    with ExitStack() as stack:
        for name, value in values.items():
            inside = [other for other in known if other.startswith(f"{name}__")]
            for restored in (*reversed(inside), name):  # last in, first out: what is nested after what it is in
                stack.callback(_restore, known[restored], before[known[restored]])
            known[name].override(value)
        changed = {provider for provider in known.values() if provider.overridden != before[provider]}
        for singleton in list(cast(Any, container).traverse(types=[providers.BaseSingleton])):
            if singleton.overridden:
                continue
            if changed.isdisjoint(map(_source, singleton.traverse())):
                stack.enter_context(_reset_if_built(singleton))
            else:
                stack.callback(_restore, singleton, ())
                singleton.override(_unbuilt(singleton))
        yield container


def by_name(container: Any, prefix: str = "") -> dict[str, Any]:
    """All providers of a container, those of nested ones as `outer__inner`."""
    found: dict[str, Any] = {}
    for name, provider in container.providers.items():
        found[prefix + name] = provider
        if isinstance(provider, providers.Container | providers.DependenciesContainer):
            found |= by_name(provider, f"{prefix}{name}__")
    return found


def _source(provider: Any) -> Any:
    """Itself, but for an option its configuration, which alone is overridden."""
    return provider._get_root() if isinstance(provider, providers.ConfigurationOption) else provider


def _unbuilt(singleton: Any) -> Any:
    """One of the same kind, with the same dependencies."""
    copy = type(singleton)()
    copy.set_provides(singleton.provides)
    return copy.set_args(*singleton.args).set_kwargs(**singleton.kwargs).set_attributes(**singleton.attributes)


@contextmanager
def _reset_if_built(singleton: Any) -> Generator[None]:
    """At the end, if it was built inside: it doesn't tell, what it is built by can."""
    provides, is_built = singleton.provides, False

    def build(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_built
        is_built = True
        return provides(*args, **kwargs)

    if singleton.provided_type is None:  # else it takes classes only
        singleton.set_provides(build)
    try:
        yield
    finally:
        singleton.set_provides(provides)
        if is_built:
            singleton.reset()


def _restore(provider: Any, overridden: tuple[Any, ...]) -> None:
    """Take back what was put over it inside the block, also by others.

    A nested container, taken back, takes one too many from what it did not replace: that is put back.
    """
    while len(provider.overridden) > len(overridden):
        provider.reset_last_overriding()
    for lost in overridden[len(provider.overridden) :]:
        provider.override(lost)


def _unknown(name: str, container: Any, known: dict[str, Any]) -> ConfigurationError:
    close = get_close_matches(name, known, n=1)
    meant = f": did you mean {close[0]!r}?" if close else "."
    owner = container.parent_name or type(container).__name__
    return ConfigurationError(f"{owner} has no provider {name!r}{meant} It has {', '.join(sorted(known))}")
