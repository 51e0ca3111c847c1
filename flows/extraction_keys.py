"""What makes features current: their raw input, the extractor's spec, and its code.

The key of a patient's features stands beside them on the disk, and that file is the only memory of
what was done. Prefect's cache of results is left out: it would go on to vouch for features that
were withdrawn, deleted or damaged.
"""

from __future__ import annotations

import ast
import hashlib
import hmac
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from modalities.files import fingerprint

if TYPE_CHECKING:
    from flows.protocol import ModalitySpec

    Stale = Literal["new", "input", "protocol", "code", "secret"]

SOURCE: Final = "source_digest"
CODE: Final = "code_version"
KEY: Final = "cache_key"
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class MadeFrom:
    """What features on the disk say of themselves.

    Attributes
    ----------
    source, spec, code
        Digest of the raw input, fingerprint of the spec, version of the extractor's code.
    key
        All of it under the site's secret; empty in features of before there were keys.
    """

    source: str
    spec: str
    code: str = ""
    key: str = ""


@dataclass(frozen=True)
class Recipe:
    """How a site makes the features of one modality now."""

    spec: str
    code: str
    secret: bytes = field(repr=False)

    def key(self, source: str) -> str:
        """Key of the features of one raw input.

        Parameters
        ----------
        source
            Digest of the input. Only its HMAC under the site's secret goes into the key, which
            therefore confirms no guessed input.
        """
        keyed = hmac.new(self.secret, f"extraction\0{source}".encode(), hashlib.sha256)
        return fingerprint([keyed.hexdigest(), self.spec, self.code])

    def why_stale(self, made: MadeFrom | None, source: str) -> Stale | None:
        """Say why features must be made again; None where they are current.

        Features without a key are those of an older version and count as made by this one's code.
        """
        if made is None:
            return "new"
        if made.spec != self.spec:
            return "protocol"
        if made.source != source:
            return "input"
        if made.key in {"", self.key(source)}:
            return None
        return "code" if made.code != self.code else "secret"


def recipe(spec: ModalitySpec, secret: bytes) -> Recipe:
    """Give how a site makes features of this spec, with the code that is installed."""
    return Recipe(spec.fingerprint(), code_version(_package(spec)), secret)


def _package(spec: ModalitySpec) -> str:
    return "/".join(type(spec).__module__.split(".")[:2])


@lru_cache(maxsize=8)
def code_version(package: str) -> str:
    """SHA-256 over what the code of one extractor does, as 64 hex digits.

    Comments, docstrings and layout do not count: extraction may take weeks, and nobody should wait
    that long to correct a sentence. Nor does any other package of ours or of others.

    Parameters
    ----------
    package
        Folder or module below the project, as ``modalities/pathology``.
    """
    path = _ROOT / package
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    trees = [[f.relative_to(_ROOT).as_posix(), ast.parse(f.read_bytes())] for f in files]
    return fingerprint([[name, _shape(tree)] for name, tree in trees])


def _shape(node: Any) -> Any:
    """Reduce a syntax tree to lists; fields that newer Pythons add empty leave no trace."""
    if isinstance(node, list):
        return [_shape(x) for x in node if not _is_text(x)]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [[name, _shape(x)] for name, x in ast.iter_fields(node) if x not in (None, [])]
    return [type(node).__name__, *fields]


def _is_text(node: Any) -> bool:
    """Whether a statement is a text alone: a docstring, which does nothing."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
