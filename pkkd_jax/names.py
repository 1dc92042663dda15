"""Names in a config become objects, and a user's mistakes become one clear line."""

import difflib
import importlib
import inspect
import pkgutil
import traceback
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake in what the user asked for.

    The message is one line that names the value, what is allowed and the next step; the command
    line prints it without a traceback.
    """


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """The error for a wrong name: the nearest right one, and all right ones."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}allowed: {', '.join(allowed)}")


def public_names(package: str) -> dict[str, str]:
    """Maps every name in the `__all__` of a module of `package` to that module."""
    path = importlib.import_module(package).__path__
    found = {}
    for info in pkgutil.iter_modules(path):
        module = importlib.import_module(f"{package}.{info.name}")
        found.update(dict.fromkeys(getattr(module, "__all__", ()), module.__name__))
    return found


def resolve(package: str, name: str, kind: str) -> Callable:
    """Finds what a config calls `name`.

    Args:
      package: where plain names are looked up: the `__all__` of each of its modules.
      name: a plain name, or the dotted path of a user's own, `my_module.my_object`.
      kind: what the name stands for, used in messages: "model", "data set".
    Raises:
      UserError: if there is no such name; the message has the nearest right one.
    """
    if "." in name:
        module, _, attribute = name.rpartition(".")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())
            raise UserError(
                f"{kind} {name!r} cannot be imported: {type(error).__name__}: {text}"
                f" ({frame.filename}:{frame.lineno}); a dotted name is module.attribute, and its"
                " module must be on PYTHONPATH"
            ) from error
    known = public_names(package)
    if name not in known:
        raise unknown(kind, name, known)
    return getattr(importlib.import_module(known[name]), name)


def call(package: str, name: str, kind: str, /, **arguments):
    """Resolves `name` and calls it with the keywords of a config.

    Raises:
      UserError: if there is no such name, or it does not take these keywords.
    """
    function = resolve(package, name, kind)
    # `parent` and `name` are Flax's own, never a config's.
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(function).parameters.items()
        if key not in ("parent", "name")
    }
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for keyword in arguments:
            if keyword not in parameters:
                raise unknown(f"keyword of {kind} {name!r},", keyword, parameters)
    for keyword, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not variadic and parameter.default is parameter.empty and keyword not in arguments:
            raise UserError(
                f"{kind} {name!r} needs {keyword}=...: it takes {', '.join(parameters)}"
            )
    return function(**arguments)
