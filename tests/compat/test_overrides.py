"""Private members of foreign classes are listed, and overridden as they are."""

import ast
import functools
import importlib
import inspect
import textwrap
from pathlib import Path

import keras_allreduce
from keras_allreduce.compat.overrides import MEMBERS

PACKAGE = Path(keras_allreduce.__file__).parent
FOREIGN = ("tensorflow", "keras")


def classes():
    """Every class of the package that has a foreign base."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] in ("__init__", "__main__"):
            continue
        module = importlib.import_module(".".join(parts))
        for each in vars(module).values():
            if (
                inspect.isclass(each)
                and each.__module__ == module.__name__
                and foreign_bases(each)
            ):
                yield each


def foreign_bases(cls):
    return [
        base for base in cls.__mro__ if base.__module__.split(".")[0] in FOREIGN
    ]


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def members(cls):
    """Private names in the body of a class: its own, and what it touches."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    names = {name for name in vars(cls) if is_private(name)} - {"_abc_impl"}
    (definition,) = tree.body
    pending = list(ast.iter_child_nodes(definition))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ClassDef):
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value
            owner = owner.func if isinstance(owner, ast.Call) else owner
            if isinstance(owner, ast.Name) and owner.id in (
                *("self", "cls", "super"),
            ):
                names.add(node.attr)
    return names


@functools.cache
def shared():
    """Members that a class has in common with a foreign base.

    Returns:
        Dict from `"Class._name"` of the base to the classes of the package.
    """
    found = {}
    for cls in classes():
        for name in members(cls):
            for base in foreign_bases(cls):
                if name in members(base):
                    key = f"{base.__name__}.{name}"
                    found.setdefault(key, (base, []))[1].append(cls)
                    break
    return found


def test_each_private_member_of_a_foreign_base_is_listed():
    listed = {f"{cls}.{name}" for cls in MEMBERS for name in MEMBERS[cls]}
    assert not set(shared()) - listed, "List them in compat/overrides.py."
    assert not listed - set(shared()), "They are no longer used."


def test_an_override_takes_what_its_base_takes():
    differ = []
    for member, (base, ours) in shared().items():
        name = member.split(".")[1]
        theirs = vars(base).get(name)
        for cls in ours:
            mine = vars(cls).get(name)
            if inspect.isfunction(theirs) and inspect.isfunction(mine):
                signatures = (inspect.signature(f) for f in (mine, theirs))
                if not takes_what(*signatures):
                    differ.append(f"{cls.__name__} overrides {member}")
    assert not differ


def takes_what(mine, theirs):
    """Whether each call that fits `theirs` fits `mine`, by their names."""
    own, base = (
        [(each.name, each.kind) for each in signature.parameters.values()]
        for signature in (mine, theirs)
    )
    if {kind for _, kind in own} >= {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }:
        return True
    extra = list(mine.parameters.values())[len(base) :]
    return own[: len(base)] == base and all(
        each.default is not each.empty for each in extra
    )


def test_signatures_are_compared():
    theirs = inspect.signature(lambda self, value, options: None)
    for fits in (
        lambda self, value, options: None,
        lambda self, value, options=None, more=1: None,
        lambda self, *args, **kwargs: None,
    ):
        assert takes_what(inspect.signature(fits), theirs)
    for does_not in (
        lambda self, value: None,
        lambda self, value, settings: None,
        lambda self, value, options, more: None,
    ):
        assert not takes_what(inspect.signature(does_not), theirs)
