"""The reference: what users call says what it is, what it takes, and how it is called."""

import doctest
import inspect
import re
from types import ModuleType
from typing import get_origin

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lightning_hpo
from lightning_hpo.regularizers import PenaltyMixin

USED = [n for n in lightning_hpo.__all__ if not isinstance(getattr(lightning_hpo, n), ModuleType)]
PAGES = [
    lightning_hpo,
    *(v for n in lightning_hpo.__all__ if isinstance(v := getattr(lightning_hpo, n), ModuleType)),
]
# By qualified names, each once.
PUBLIC = {
    f"{thing.__module__}.{thing.__qualname__}": thing
    for page in PAGES
    for name in page.__all__
    if (inspect.isclass(thing := getattr(page, name)) or inspect.isfunction(thing))
    and get_origin(thing) is None  # Python 3.10 takes aliases of types for classes
}
SECTIONS = {"Args", "Attributes", "Example", "Raises", "Returns", "Yields"}


def _sections(doc):
    """Returns the text before all sections, and that of each, by its heading."""
    parts = re.split(r"^([A-Z][A-Za-z ]+):\n", inspect.cleandoc(doc), flags=re.MULTILINE)
    return parts[0], dict(zip(parts[1::2], parts[2::2], strict=True))


def _parameters(function):
    return [n for n in inspect.signature(function).parameters if n not in ("self", "cls")]


def _described(doc):
    return re.findall(r"^    \*{0,2}(\w+):", _sections(doc)[1].get("Args", ""), flags=re.MULTILINE)


def _methods(cls):
    """Yields the public methods that a class defines itself, and is the first to document."""
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        if next(base for base in reversed(cls.__mro__) if name in vars(base)) is cls:
            yield name, function


@pytest.mark.parametrize("name", USED)
def test_what_users_call_is_described_with_an_example(name):
    thing = getattr(lightning_hpo, name)
    summary, sections = _sections(thing.__doc__)
    first = summary.split("\n")[0]
    assert first.endswith((".", "?"))
    own = inspect.isfunction(thing) or "__init__" in vars(thing)
    taken = _parameters(thing) if own or hasattr(thing, "__dataclass_fields__") else []
    assert _described(thing.__doc__) == taken
    assert ">>> " in sections.get("Example", "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.__name__)
def test_pages_begin_with_what_is_on_them(page):
    _check_text(page.__name__, page.__doc__)
    assert page.__docformat__ == "google"  # pdoc asks each module


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_thing_and_its_methods_have_a_summary(name):
    thing = PUBLIC[name]
    _check_text(name, thing.__doc__)
    for path, method in _methods(thing) if inspect.isclass(thing) else ():
        _check_text(f"{name}.{path}", method.__doc__)


def _check_text(path, doc):
    summary, sections = _sections(doc or "")
    assert summary.split("\n")[0].endswith((".", "?")), path
    # Other lines that look like headings would become some on the page.
    assert sections.keys() <= SECTIONS, path
    assert "::\n" not in doc, path
    assert ":`~" not in doc, path


@pytest.mark.parametrize("name", [n for n, thing in PUBLIC.items() if inspect.isclass(thing)])
def test_methods_name_what_they_take(name):
    for path, method in _methods(PUBLIC[name]):
        taken = _parameters(method)
        is_elsewhere = "; see :meth:" in method.__doc__.split("\n")[0]
        if taken and not is_elsewhere and not _is_a_hook(PUBLIC[name], path):
            assert _described(method.__doc__) == taken, path


def _is_a_hook(cls, name):
    """Whether Lightning or torch call a method, and describe it."""
    hosts = [pl.LightningModule if issubclass(cls, PenaltyMixin) else cls]
    hosts += [base for base in (pl.Callback, nn.Module) if issubclass(cls, base)]
    return any(hasattr(host, name) for host in hosts if host is not cls)


@pytest.fixture(scope="module")
def names():
    """Returns what the example of the package has defined, where the others go on."""
    torch.set_default_dtype(torch.float32)
    return _run(lightning_hpo.__doc__, {}, "lightning_hpo")


@pytest.mark.parametrize("name", [n for n, thing in PUBLIC.items() if ">>> " in thing.__doc__])
def test_examples_show_what_happens(name, names):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    _run(PUBLIC[name].__doc__, names, name)


def _run(doc, names, name):
    """Runs the example of a docstring with a copy of names; returns these and its own."""
    test = doctest.DocTestParser().get_doctest(doc, names, name, None, None)
    said = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(
        test, out=said.append, clear_globs=False
    )
    assert result.attempted > 0
    assert result.failed == 0, "".join(said)
    return test.globs
