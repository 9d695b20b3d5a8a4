"""The reference: what users call says what it is, what it takes, and how it is called."""

import ast
import doctest
import html
import inspect
import pydoc
import re
import textwrap
from types import ModuleType
from typing import get_origin

import lightning.pytorch as pl
import pdoc.docstrings
import pdoc.render_helpers
import pytest
import torch
from torch import nn

import lightning_hpo
from lightning_hpo.monitoring import History
from lightning_hpo.regularizers import Penalty, PenaltyMixin
from lightning_hpo.strategy import Strategy

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
# Classes whose methods users call or override: what the package exports, what its mixins have in
# common, and what those hand out.
USED = {
    name: thing
    for name, thing in PUBLIC.items()
    if inspect.isclass(thing)
    and (
        thing.__name__ in lightning_hpo.__all__
        or thing in (PenaltyMixin, Penalty, History, Strategy)
    )
}
# Public within the package, which alone calls them.
CALLED_INSIDE = {
    "Hyperparameter": {"unresolved", "kept", "forget", "fixed", "raw_of", "settled"},
    "CategoricalHyperparameter": {"in_force"},
    "History": {"append"},
    "Penalty": {
        *("bound", "raw", "has_constants", "total", "term", "gradients"),
        *("add_gradient_", "tangent_", "adjoint_"),
    },
    "PenaltyMixin": {"agree_on_constants", "resolve_strengths", "check_penalties_applied"},
    "PolicyGradient": {"draws"},
}
SECTIONS = {"Args", "Attributes", "Example", "Raises", "Returns", "Yields"}
# What is passed on there is chosen to fit.
NEVER_RAISED = {"lightning_hpo.strategy.choose_estimators": {"TypeError", "ValueError"}}
# Whose work it is, where something published is implemented.
SOURCES = {
    "OnlineHPOCallback": "online-HPO paper",
    "T1T2": "Luketina et al. 2016, eq. 3",
    "ClipR": "online-HPO paper, Algorithm 1",
    "UnrollK": "Franceschi et al. 2017",
    "Implicit": "Pedregosa 2016, Algorithm 1",
    "PolicyGradient": "Adam & Lorraine 2018, eq. 2",
    "LSTMController": "Adam & Lorraine (2018, §3)",
    "SignalToNoise": "Kingma & Ba 2015",
    "L2Mixin": "Krogh & Hertz 1992",
    "L2Penalty": "online-HPO paper, §3.5.1",
    "L1Mixin": "Tibshirani 1996",
    "L1Penalty": "Tibshirani 1996",
    "DropoutMixin": "Srivastava et al. 2014",
    "TunableDropout": "Srivastava et al. (2014)",
    "StackedRNN": "Zaremba et al. (2014)",
    "GaussianNoise": "Fioravanti, §II-B, eq. 6",
    "GaussianNoiseMixin": "Luketina et al. (2016, §3)",
    "LabelSmoothing": "Szegedy et al. 2016, §7",
    "LossWeightMixin": "Franceschi et al. (2017, §5.3)",
    "ExampleWeightMixin": "Franceschi et al. 2017, §5.1",
    "Simplex": "Duchi et al. (2008, Fig. 1)",
    "L1Ball": "Duchi et al. (2008, §4)",
    "freeze": "Luketina et al. 2016, §3.1",
    "Backend": "Franceschi et al. 2017, Algorithm 1",
    "Reverse": "Pearlmutter (1994)",
    "Forward": "Pearlmutter (1994)",
    "FiniteDifference": "Nocedal & Wright (2006, §8.1)",
    "LambdaDifference": "online-HPO paper, §3.5.2",
}


def _sections(doc):
    """Returns the text before all sections, and that of each, by its heading."""
    parts = re.split(r"^([A-Z][A-Za-z ]+):\n", inspect.cleandoc(doc), flags=re.MULTILINE)
    return parts[0], dict(zip(parts[1::2], parts[2::2], strict=True))


def _parameters(function):
    return [n for n in inspect.signature(function).parameters if n not in ("self", "cls")]


def _described(doc, section="Args"):
    return re.findall(r"^    \*{0,2}(\w+):", _sections(doc)[1].get(section, ""), flags=re.MULTILINE)


def _methods(cls):
    """Yields the public methods that a class defines itself, and is the first to document."""
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        if next(base for base in reversed(cls.__mro__) if name in vars(base)) is cls:
            yield name, function


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_thing_is_described_with_an_example(name):
    thing = PUBLIC[name]
    summary, sections = _sections(thing.__doc__)
    assert summary.split("\n")[0].endswith((".", "?"))
    own = inspect.isfunction(thing) or (
        "__init__" in vars(thing) and not getattr(thing, "_is_protocol", False)
    )
    is_data = hasattr(thing, "__dataclass_fields__")
    described = _described(thing.__doc__)
    if is_data and not described:  # it is read, not made
        described = _described(thing.__doc__, "Attributes")
    assert described == (_parameters(thing) if own or is_data else [])
    assert ">>> " in sections.get("Example", "")


@pytest.mark.parametrize("name", SOURCES)
def test_published_work_is_cited(name):
    (thing,) = (thing for thing in PUBLIC.values() if thing.__name__ == name)
    assert SOURCES[name] in " ".join(thing.__doc__.split())


@pytest.mark.parametrize("name", PUBLIC)
def test_errors_are_described(name):
    """What its own code raises, or that of helpers which it calls by name, is under Raises."""
    thing = PUBLIC[name]
    if inspect.isfunction(thing):
        assert _raised(thing) <= _raises(thing.__doc__) | NEVER_RAISED.get(name, set())
        return
    for own in ("__init__", "__post_init__", "__init_subclass__"):
        if function := _function(vars(thing).get(own)):
            assert _raised(function, thing) <= _raises(thing.__doc__), own
    for path, member in vars(thing).items():
        if (function := _function(member)) and not path.startswith("_"):
            # A class may say it for all its methods, and the first of a name for its overrides.
            texts = [
                thing.__doc__,
                *(vars(c)[path].__doc__ for c in thing.__mro__ if path in vars(c)),
            ]
            assert _raised(function, thing) <= set().union(*map(_raises, texts)), path


def test_errors_are_found_in_helpers():
    assert _raised(lightning_hpo.freeze) == {"TypeError", "ValueError"}
    assert _raised(lightning_hpo.ClipR.__init__) == {"TypeError", "ValueError"}
    assert _raised(lightning_hpo.L2Mixin.register_l2, lightning_hpo.L2Mixin) == {
        "TypeError",
        "ValueError",
    }


def _function(member):
    """Returns the function of a method, class method or property; None without source code."""
    member = getattr(member, "__func__", getattr(member, "fget", member))
    has_code = inspect.isfunction(member) and member.__code__.co_filename != "<string>"
    return inspect.unwrap(member) if has_code else None


def _raises(doc):
    """Returns the kinds of errors that a docstring lists, or the one to which it refers."""
    if reference := re.search(r"; see :meth:`([\w.]+)`", doc or ""):
        return _raises(pydoc.locate(reference[1]).__doc__)
    return set(_described(doc or "", "Raises"))


def _raised(function, cls=None, seen=None):
    """Returns the kinds of errors in the code of a function and of what it calls by name.

    That is a function or a class of this package, or a method of ``self``.
    """
    function, seen = inspect.unwrap(function), set() if seen is None else seen
    if function in seen or not function.__module__.startswith("lightning_hpo"):
        return set()
    seen.add(function)
    found = set()
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    for node in (node for line in definition.body for node in ast.walk(line)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if isinstance(node.exc.func, ast.Name):  # else it is raised again, as what it was
                found.add(node.exc.func.id)
        elif isinstance(node, ast.Call):
            for called, owner in _called(node.func, function, cls):
                found |= _raised(called, owner, seen)
    return found - {"NotImplementedError"}  # a subclass is to define it


def _called(name, function, cls):
    """Yields the functions that a call runs, each with the class that it belongs to."""
    if isinstance(name, ast.Attribute) and ast.unparse(name.value) == "self":
        found = [(inspect.getattr_static(cls, name.attr, None), cls)] if cls else []
    else:
        called = function.__globals__.get(name.id) if isinstance(name, ast.Name) else None
        found = [(called, None)]
        if inspect.isclass(called):
            starts = ("__init__", "__post_init__")
            found = [(getattr(called, start, None), called) for start in starts]
    for member, owner in found:
        if code := _function(member):
            yield code, owner


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


TEXTS = {
    **{page.__name__: page.__doc__ for page in PAGES},
    **{name: thing.__doc__ for name, thing in PUBLIC.items()},
    **{
        f"{name}.{path}": member.__doc__
        for name, thing in PUBLIC.items()
        for path, member in vars(thing).items()
        if _function(member) and not path.startswith("_")
    },
}


@pytest.mark.parametrize("name", TEXTS)
def test_equations_stand_on_the_page_as_they_are_written(name):
    """Indented lines keep their breaks and symbols, and Markdown makes nothing of the others."""
    text = inspect.cleandoc(TEXTS[name])
    page = pdoc.render_helpers.to_html(pdoc.docstrings.convert(text, "google", None))
    blocks = [
        html.unescape(re.sub("<.*?>", "", b)) for b in re.findall(r"<pre>.*?</pre>", page, re.S)
    ]
    shown = "\n".join("\n".join(map(str.rstrip, block.splitlines())) for block in blocks)
    for paragraph in _sections(text)[0].split("\n\n"):
        lines = paragraph.split("\n")
        indented = [line.startswith("    ") for line in lines]
        assert all(indented) or not any(indented), f"no empty line before or after {paragraph}"
        if all(indented):
            assert textwrap.dedent(paragraph) in shown
    prose = re.sub(r"<pre>.*?</pre>|<code>.*?</code>", "", page, flags=re.S)
    emphasized = re.findall(r"(?<![\w*])\*(\w+)\*", text)
    assert re.findall(r"<em>(.*?)</em>", prose, re.S) == emphasized
    assert not re.search(r"<(h[1-5]|hr|ol|table|sub|sup|s|del|img)\b", prose)
    assert ">>>" not in html.unescape(prose)


@pytest.fixture(scope="module")
def names():
    """Returns what the example of each page has defined, where the others on it go on."""
    torch.set_default_dtype(torch.float32)
    first = _run(lightning_hpo.__doc__, {}, "lightning_hpo")
    return {
        page.__name__: _run(page.__doc__, first, page.__name__) if ">>> " in page.__doc__ else first
        for page in PAGES
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_show_what_happens(name, names):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    page = next(page for page in PAGES if PUBLIC[name] in vars(page).values())
    _run(PUBLIC[name].__doc__, names[page.__name__], name)


# After `_methods` and `_is_a_hook`.
METHODS = {
    f"{name}.{path}": method.__doc__
    for name, thing in USED.items()
    for path, method in _methods(thing)
    if path not in CALLED_INSIDE.get(thing.__name__, ()) and not _is_a_hook(thing, path)
}


def test_what_only_the_package_calls_is_there():
    known = {thing.__name__: {path for path, _ in _methods(thing)} for thing in USED.values()}
    assert all(paths <= known[name] for name, paths in CALLED_INSIDE.items())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_is_called_has_an_example(name):
    assert ">>> " in _sections(METHODS[name])[1].get("Example", "")


@pytest.mark.parametrize("name", METHODS)
def test_examples_of_methods_go_on_from_that_of_their_class(name, names, tmp_path, monkeypatch):
    if ".plot(" in METHODS[name]:
        pytest.importorskip("matplotlib", reason="it draws").use("Agg")
    monkeypatch.chdir(tmp_path)  # where it writes files
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    owner = name.rpartition(".")[0]
    page = next(page for page in PAGES if PUBLIC[owner] in vars(page).values())
    _run(METHODS[name], _run(PUBLIC[owner].__doc__, names[page.__name__], owner), name)


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
