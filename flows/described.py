"""Let Prefect's page show what a flow's parameters mean and may be, and of its failure a code."""

from __future__ import annotations

import functools
import inspect
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar, get_type_hints

from prefect.context import FlowRunContext
from prefect.states import Failed
from pydantic import StringConstraints

from flows.sealed import SiteError

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")

Slug = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,39}$")]
"""Opaque name of a study or a site: parameters reach Prefect's server, and it takes no other."""

_SECTION = re.compile(r"(?m)^(\w+)\n-+\n")
_ENTRY = re.compile(r"(?m)^(\w[\w, ]*)\n((?:[ \t]+.*\n?|\n)+)")


def described(body: Callable[P, R]) -> Callable[P, R]:
    """Give a flow's body types and a docstring that Prefect can read.

    Prefect looks types up where a wrapper was defined, not where the body was, and reads
    descriptions of parameters in another form than ours. What a flow raises it writes to a file and
    tells its server the path; the state of a failure holds it for the caller alone.
    """

    @functools.wraps(body)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            return body(*args, **kwargs)
        except SiteError as error:
            if FlowRunContext.get() is None:
                raise
            failure = error
        return Failed(message=f"ended with {failure}", data=failure)

    signature = inspect.signature(body)
    types = _types(body, signature)
    wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            parameter.replace(annotation=types[name])
            for name, parameter in signature.parameters.items()
        ],
        return_annotation=inspect.Signature.empty,
    )
    wrapped.__annotations__ = {name: types[name] for name in signature.parameters}
    summary = inspect.getdoc(body) or ""
    told = "".join(f"\n    {name}: {text}" for name, text in descriptions(summary).items())
    wrapped.__doc__ = f"{_SECTION.split(summary)[0].strip()}\n\nArgs:{told}\n"
    return wrapped


def descriptions(docstring: str) -> dict[str, str]:
    """Read what a docstring in numpydoc form says of each parameter, on one line each."""
    sections = _SECTION.split(inspect.cleandoc(docstring))
    texts = dict(zip(sections[1::2], sections[2::2], strict=True))
    found = {}
    for names, text in _ENTRY.findall(texts.get("Parameters", "") + "\n"):
        for name in names.split(","):
            found[name.strip()] = " ".join(text.split())
    return found


def _types(body: Callable[..., object], signature: inspect.Signature) -> dict[str, Any]:
    """Evaluate the parameters' annotations; that of the result may be for type checkers only."""
    asked = SimpleNamespace(
        __annotations__={name: x.annotation for name, x in signature.parameters.items()}
    )
    where = inspect.unwrap(body).__globals__
    return get_type_hints(asked, globalns=where, include_extras=True)
