"""Everything public says what it computes, from what and what it raises, and shows an example, in one style."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pkjax
import pytest

MODULES = ("pkjax", "pkjax.paths", "pkjax.path_kernel", "pkjax.dynamics", "pkjax.training", "pkjax.training.recipes",
           "pkjax.plots", "pkjax.data", "pkjax.models", "pkjax.experiments", "pkjax.experiments.figures",
           "pkjax.experiments.findings")
SHAPED = re.compile(r"(Shaped|Num|Float|Int|Integer|UInt|Bool|Key|Real|Inexact)\d*$")
ARRAYS = {"Array", "ndarray", "ArrayLike"}


def collected():
    """Public functions and classes, and the names of public constants, each once."""
    things, constants = {}, set()
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                things[f"{thing.__module__}.{thing.__name__}"] = thing
            elif not inspect.ismodule(thing):
                constants.add(name)
    return things, constants


FILES = sorted(Path(pkjax.__file__).parent.rglob("*.py"))
PUBLIC, CONSTANTS = collected()
everything = pytest.mark.parametrize("name", PUBLIC)


def tree(thing):
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    return node


def documented(body):
    """The names in a body of statements that a string stands below."""
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign | ast.Assign):
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            yield ast.unparse(target), isinstance(text, str)


def unshaped(annotation):
    """The names of arrays in an annotation that stand in no type of jaxtyping; those of callables are in their text."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return unshaped(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.Subscript):
        head = ast.unparse(annotation.value)
        return set() if SHAPED.match(head) or head == "Callable" else unshaped(annotation.slice)
    name = annotation.id if isinstance(annotation, ast.Name) else getattr(annotation, "attr", None)
    if name in ARRAYS:
        return {name}
    children = [] if isinstance(annotation, ast.Attribute) else ast.iter_child_nodes(annotation)
    return set().union(*map(unshaped, children))


def raised(node):
    """The exceptions that a body itself raises, not those of functions inside it."""
    inner = {id(part) for sub in ast.walk(node) if sub is not node and isinstance(sub, ast.FunctionDef)
             for part in ast.walk(sub)}
    return {ast.unparse(part.exc.func) for part in ast.walk(node)
            if isinstance(part, ast.Raise) and isinstance(part.exc, ast.Call) and id(part) not in inner
            and isinstance(part.exc.func, ast.Name)}


@everything
def test_the_summary_is_one_sentence_on_one_line(name):
    lines = inspect.getdoc(PUBLIC[name]).split("\n")
    assert lines[0].endswith(".")
    assert lines[1:2] in ([], [""])
    assert not re.search(r"[.!?] [A-ZΑ-Ω]", lines[0])


@everything
def test_there_is_an_example(name):
    assert ">>> " in inspect.getdoc(PUBLIC[name])


@everything
def test_the_errors_that_a_body_raises_are_named(name):
    thing, text = PUBLIC[name], inspect.getdoc(PUBLIC[name])
    errors = raised(tree(thing)) if inspect.isfunction(thing) or hasattr(thing, "__post_init__") else set()
    if errors:
        assert re.search(r"\bRaises:?\b", text)
    for error in errors:
        assert error in text


@everything
def test_arguments_are_annotated_and_arrays_have_shapes(name):
    node = tree(PUBLIC[name])
    functions = [node] if isinstance(node, ast.FunctionDef) else [
        part for part in node.body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")]
    for function in functions:
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs,
                 *filter(None, (arguments.vararg, arguments.kwarg))]
        for argument in every:
            if argument.arg != "self":
                assert argument.annotation is not None, argument.arg
                assert not unshaped(argument.annotation), argument.arg
        assert function.returns is not None
        assert not unshaped(function.returns)


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if inspect.isclass(thing)])
def test_fields_are_annotated_with_shapes_and_documented_where_they_stand(name):
    body = tree(PUBLIC[name]).body
    fields = {ast.unparse(part.target): part for part in body if isinstance(part, ast.AnnAssign)}
    has_text = dict(documented(body))
    for field, part in fields.items():
        assert has_text[field], field
        assert not unshaped(part.annotation), field


def test_public_constants_are_documented_where_they_stand():
    has_text = {}
    for file in FILES:
        has_text |= {name: ok for name, ok in documented(ast.parse(file.read_text()).body) if name in CONSTANTS}
    assert has_text == dict.fromkeys(CONSTANTS, True)
    assert "erk_scope" in CONSTANTS


FOREIGN = re.compile(r"^ *\.\. \w+::|:(?:func|class|mod|data|meth):`|^ *:(?:param|returns?|raises)\b"
                     r"|^(?:Args|Returns|Raises|Examples): +\S.*$", re.MULTILINE)
EMPTY = re.compile(r"Raises (?:nothing|none)|Source: definition", re.IGNORECASE)


def badly_written(text):
    """What a docstring holds that is not Google's style with Markdown, or that says nothing."""
    faults = [match[0].strip() for pattern in (FOREIGN, EMPTY) for match in pattern.finditer(text)]
    section, examples = 0, False
    for line in text.split("\n"):
        depth = len(line) - len(line.lstrip())
        if line.strip() == "Examples:":
            section, examples = depth, True
        elif line.strip() and depth <= section:
            examples = False
        if line.lstrip().startswith(">>> ") and not examples:
            return [*faults, "an example outside of an Examples section"]
    return faults


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(FILES[0].parent)))
def test_docstrings_have_one_style(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            assert not badly_written(ast.get_docstring(node) or ""), getattr(node, "name", file.name)


def test_the_checks_can_fail():
    bad = ast.parse("def f(x: Array | None) -> Float[Array, '']:\n    raise ValueError('')").body[0]
    assert unshaped(bad.args.args[0].annotation) == {"Array"}
    assert unshaped(ast.parse("tuple[np.ndarray, int]", mode="eval").body) == {"ndarray"}
    assert not unshaped(ast.parse("Float[Array | np.ndarray, 'N'] | Callable[[Array], Array]", mode="eval").body)
    assert raised(bad) == {"ValueError"}
    assert badly_written("See :func:`f`.\n\n.. math:: x\n\n>>> 1\n1\n\nRaises nothing.\nSource: definition.") == [
        ":func:`", ".. math::", "Raises nothing", "Source: definition", "an example outside of an Examples section"]
    assert badly_written("Add.\n\nArgs: as in `f`, and\n    x: more.") == ["Args: as in `f`, and"]
    assert not badly_written("Add.\n\nSource: equation 1.\n\nExamples:\n    >>> 1 + 1\n    2\n")
    assert dict(documented(ast.parse("a: int\n'''about a'''\nb: int").body)) == {"a": True, "b": False}
