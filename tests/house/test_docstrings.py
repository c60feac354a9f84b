"""Everything public says what it computes, from what, what it raises and where it is from, and shows an example."""

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
    found, constants = {}, set()
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found[f"{thing.__module__}.{thing.__name__}"] = thing
            elif not inspect.ismodule(thing):
                constants.add(name)
    return found, constants


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
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            yield ast.unparse(target), isinstance(said, str)


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
def test_the_errors_are_named(name):
    thing, text = PUBLIC[name], inspect.getdoc(PUBLIC[name])
    errors = raised(tree(thing)) if inspect.isfunction(thing) or hasattr(thing, "__post_init__") else set()
    if inspect.isfunction(thing) or errors:
        assert re.search(r"\bRaises\b", text)
    for error in errors:
        assert error in text


@everything
def test_the_source_is_named(name):
    """Of a result, that is the function it comes from; of what is this library's own, "definition"."""
    text = inspect.getdoc(PUBLIC[name])
    given = r"|(Returned|Raised|Given|returned) by ``\w+|Raised by whatever" if inspect.isclass(PUBLIC[name]) else ""
    assert re.search(rf"\bSource: \S{given}", text)


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
    said = dict(documented(body))
    for field, part in fields.items():
        assert said[field], field
        assert not unshaped(part.annotation), field


def test_public_constants_are_documented_where_they_stand():
    said = {}
    for file in Path(pkjax.__file__).parent.rglob("*.py"):
        said |= {name: ok for name, ok in documented(ast.parse(file.read_text()).body) if name in CONSTANTS}
    assert said == dict.fromkeys(CONSTANTS, True)
    assert "erk_scope" in CONSTANTS


def test_the_checks_can_fail():
    bad = ast.parse("def f(x: Array | None) -> Float[Array, '']:\n    raise ValueError('')").body[0]
    assert unshaped(bad.args.args[0].annotation) == {"Array"}
    assert unshaped(ast.parse("tuple[np.ndarray, int]", mode="eval").body) == {"ndarray"}
    assert not unshaped(ast.parse("Float[Array | np.ndarray, 'N'] | Callable[[Array], Array]", mode="eval").body)
    assert raised(bad) == {"ValueError"}
    assert dict(documented(ast.parse("a: int\n'''about a'''\nb: int").body)) == {"a": True, "b": False}
