"""Variables of the context (``contextvars``) during a replay, and after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, copy_context


@contextmanager
def context_put_back(earlier: Context | None = None) -> Iterator[None]:
    """Puts back what a block sets; one that is set for the first time gets its default again.

    Args:
        earlier: What the variables are to hold inside. Default: what they hold.
    """
    before = copy_context()
    try:
        if earlier is not None:
            _put(earlier)
        yield
    finally:
        _put(before)


def _put(context: Context) -> None:
    default = Context()
    for variable, value in copy_context().items():
        if variable in context:
            if context[variable] is not value:
                variable.set(context[variable])
            continue
        with suppress(LookupError):  # without a default: what reads it had to set it before
            variable.set(default.run(variable.get))
