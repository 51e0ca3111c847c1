"""The whole list of what may cross a hospital's border, and how it is written to bytes.

Each message is a frozen dataclass whose array fields declare dtype and shape. Dimensions that share
a letter must agree within a message. The bytes are a JSON header followed by the arrays, little
endian: no pickle, no free text from a site, only finite values. Both ends check everything.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass, fields
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from fusion.privacy import Refusal

MAX_BYTES: Final = 64 * 1024 * 1024
_MAX_HEADER_BYTES: Final = 2 * 1024 * 1024
_MAGIC: Final = b"CNSL1"
_HEADER: Final = struct.Struct("<5sI")
_NAME = re.compile(r"[a-z0-9][a-z0-9_./-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class MessageError(ValueError):
    """Bytes that are no message of this list, or a message that breaks its own schema."""


@dataclass(frozen=True)
class Shape:
    """Dtype and shape of an array field; a name stands for any size, equal within a message."""

    dtype: str
    dims: tuple[str, ...]


Words = NDArray[np.uint64]
Bytes = NDArray[np.uint8]
Counts = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
PerFit = Annotated[Floats, Shape("<f8", ("fits",))]
PerFitCount = Annotated[Counts, Shape("<i8", ("fits",))]
PerFitInput = Annotated[Floats, Shape("<f8", ("fits", "inputs"))]
PerFitWeight = Annotated[Floats, Shape("<f8", ("fits", "weights"))]


@dataclass(frozen=True)
class Introduce:
    """Coordinator: a run of this protocol with this code is about to begin; here is who approved.

    One signature per site named, over its approval; ``settings`` are the digests of their own
    limits that they signed with it.
    """

    protocol: str
    code: str
    consortium: str
    sites: tuple[str, ...]
    settings: tuple[str, ...]
    signatures: Annotated[Bytes, Shape("|u1", ("sites", "64"))]


@dataclass(frozen=True)
class Introduced:
    """Site: takes part, with the cohort of this digest under its own secret."""

    cohort: str


@dataclass(frozen=True)
class Describe:
    """Coordinator: say which of these modalities you can contribute, under this protocol."""

    run: str
    protocol: str
    modalities: tuple[str, ...]
    trains: bool


@dataclass(frozen=True)
class Description:
    """Site: counts behind each modality after the split, and what it will take part in.

    ``contributes`` marks the modalities that pass the site's minimum counts; ``cross_fits`` those
    whose folds pass too, ``reduces`` those with enough patients for a PCA of their inputs.
    ``cohort`` is the cohort's digest under the site's own secret. A site that is asked not to train
    takes part with all its patients as test rows, as if it had never trained.
    """

    cohort: str
    n_train: int
    n_train_events: int
    n_test: int
    n_test_events: int
    trains: bool
    contributes: Annotated[Flags, Shape("|b1", ("modalities",))]
    cross_fits: Annotated[Flags, Shape("|b1", ("modalities",))]
    reduces: Annotated[Flags, Shape("|b1", ("modalities",))]


@dataclass(frozen=True)
class AskKey:
    """Coordinator: make a new key for the secure sums of these sites, the only ones to be added."""

    run: str
    attempt: int
    roster: tuple[str, ...]


@dataclass(frozen=True)
class Key:
    """Site: an ephemeral public key, signed for this run, attempt and roster."""

    public: Annotated[Bytes, Shape("|u1", ("32",))]
    signature: Annotated[Bytes, Shape("|u1", ("64",))]


@dataclass(frozen=True)
class SetKeys:
    """Coordinator: the keys of all sites of the roster, to be checked by each."""

    run: str
    attempt: int
    roster: tuple[str, ...]
    publics: Annotated[Bytes, Shape("|u1", ("roster", "32"))]
    signatures: Annotated[Bytes, Shape("|u1", ("roster", "64"))]


@dataclass(frozen=True)
class Masked:
    """Site: a reply's sums in fixed point, hidden by masks that cancel over the roster."""

    words: Annotated[Words, Shape("<u8", ("values", "2"))]


@dataclass(frozen=True)
class AskMoments:
    """Coordinator: count, mean and squared deviations of each input of these designs."""

    run: str
    round: int
    designs: tuple[str, ...]


@dataclass(frozen=True)
class DesignMoments:
    """Site: moments over the training rows, padded with zeros to the widest design."""

    n: PerFitInput
    mean: PerFitInput
    m2: PerFitInput


@dataclass(frozen=True)
class SetScaling:
    """Coordinator: centre and scale your designs by these, for ever in this run."""

    run: str
    round: int
    designs: tuple[str, ...]
    mean: PerFitInput
    scale: PerFitInput


@dataclass(frozen=True)
class AskProducts:
    """Coordinator: summed products of the scaled inputs of these designs, for a PCA."""

    run: str
    round: int
    designs: tuple[str, ...]


@dataclass(frozen=True)
class Products:
    """Site: products over the training rows, padded with zeros to the widest design."""

    n: PerFit
    products: Annotated[Floats, Shape("<f8", ("fits", "inputs", "inputs"))]


@dataclass(frozen=True)
class SetComponents:
    """Coordinator: reduce your scaled inputs by these orthonormal axes, for ever in this run."""

    run: str
    round: int
    designs: tuple[str, ...]
    axes: Annotated[Floats, Shape("<f8", ("fits", "inputs", "components"))]


@dataclass(frozen=True)
class AskSums:
    """Coordinator: log-likelihood, gradient and information of these fits at these coefficients."""

    run: str
    round: int
    fits: tuple[str, ...]
    coefficients: PerFitInput


@dataclass(frozen=True)
class Sums:
    """Site: the sums of every fit asked for, padded with zeros to the widest.

    Where one patient outweighs the others at these coefficients, the log-likelihood is very low and
    the derivatives are zero, so that a step ending there is halved.
    """

    log_likelihood: PerFit
    gradient: PerFitInput
    information: Annotated[Floats, Shape("<f8", ("fits", "inputs", "inputs"))]
    n_patients: PerFitCount
    n_events: PerFitCount


@dataclass(frozen=True)
class AskPrivateSteps:
    """Coordinator: clipped, noisy gradients of these fits at these coefficients, for one step."""

    run: str
    round: int
    step: int
    fits: tuple[str, ...]
    coefficients: PerFitInput


@dataclass(frozen=True)
class PrivateSteps:
    """Site: summed per-patient gradients, each clipped, with Gaussian noise on the sum."""

    gradient: PerFitInput


@dataclass(frozen=True)
class SetEncoders:
    """Coordinator: the consortium's linear encoders, one per fit; a site scores its own rows."""

    run: str
    round: int
    fits: tuple[str, ...]
    coefficients: PerFitInput


@dataclass(frozen=True)
class AskUpdates:
    """Coordinator: train these networks from these weights for as long as the plan says.

    ``ridge`` is the penalty per patient of a gated fusion model's linear weights.
    """

    run: str
    round: int
    fits: tuple[str, ...]
    weights: PerFitWeight
    ridge: float


@dataclass(frozen=True)
class Updates:
    """Site: weights after its steps, padded with zeros, and the loss at those it was given.

    A network whose modality the site does not contribute has no patients behind it.
    """

    weights: PerFitWeight
    loss: PerFit
    n_patients: PerFitCount
    n_events: PerFitCount


@dataclass(frozen=True)
class SetNetworks:
    """Coordinator: the consortium's networks, one per fit; a site scores its own rows."""

    run: str
    round: int
    fits: tuple[str, ...]
    weights: PerFitWeight


@dataclass(frozen=True)
class AskEdges:
    """Coordinator: say which interior edges of this grid you can release."""

    run: str
    round: int
    edges_days: Annotated[Floats, Shape("<f8", ("edges",))]


@dataclass(frozen=True)
class Edges:
    """Site: True where the edge leaves no small cell on either side."""

    releasable: Annotated[Flags, Shape("|b1", ("interior",))]


@dataclass(frozen=True)
class SetGrid:
    """Coordinator: the edges that every site can release; the grid of this run from now on."""

    run: str
    round: int
    edges_days: Annotated[Floats, Shape("<f8", ("edges",))]


@dataclass(frozen=True)
class AskIntervals:
    """Coordinator: events and hazard-weighted days per interval for these coefficients."""

    run: str
    round: int
    arms: tuple[str, ...]
    coefficients: Annotated[Floats, Shape("<f8", ("arms", "inputs"))]


@dataclass(frozen=True)
class Intervals:
    """Site: training events and exposure per arm and interval.

    ``risk`` holds count, mean and squared deviations of each arm's training log hazards, from which
    the coordinator cuts the risk groups.
    """

    events: Annotated[Floats, Shape("<f8", ("arms", "edges"))]
    exposure: Annotated[Floats, Shape("<f8", ("arms", "edges"))]
    risk: Annotated[Floats, Shape("<f8", ("arms", "three"))]


@dataclass(frozen=True)
class AskEvaluation:
    """Coordinator: evaluate these fitted arms on your test rows.

    ``coefficients`` and ``baseline`` (per interval a hazard per day, or the log odds of a discrete
    model) define each arm's model; ``groups`` are the cut points of the log hazard between risk
    groups. ``between_site_variance`` says how far each coefficient differs between sites, for a
    site that shrinks its own coefficients toward the consortium's.
    """

    run: str
    round: int
    arms: tuple[str, ...]
    coefficients: Annotated[Floats, Shape("<f8", ("arms", "inputs"))]
    baseline: Annotated[Floats, Shape("<f8", ("arms", "edges"))]
    groups: Annotated[Floats, Shape("<f8", ("arms", "cuts"))]
    between_site_variance: Annotated[Floats, Shape("<f8", ("inputs",))]


@dataclass(frozen=True)
class Evaluation:
    """Site: evaluation sums, a row of zeros for whatever it cannot or may not tell.

    ``pairs``, ``uno`` and ``auc`` hold :class:`fusion.evaluation.PairCounts` of the arms, then of
    the site's own model and of the personalised one; ``cross`` what compares each with the first
    arm on the same pairs; ``alone`` the pairs of each modality's own log hazard. ``brier``,
    ``life_table``, ``calibration`` and ``observed_expected`` are of the main arms, Brier sums
    averaged over the grid, their last row those of the site's Kaplan-Meier curve. The rest is of
    the first arm: by level of the subgroups, by threshold, by risk group and treatment. A table
    with a small cell crosses as zeros, and so does one whose groups differ from another arm's by a
    few patients.
    """

    n_test: int
    n_test_events: int
    pairs: Annotated[Floats, Shape("<f8", ("scored", "pair_sums"))]
    uno: Annotated[Floats, Shape("<f8", ("scored", "pair_sums"))]
    auc: Annotated[Floats, Shape("<f8", ("scored", "pair_sums"))]
    cross: Annotated[Floats, Shape("<f8", ("scored",))]
    alone: Annotated[Floats, Shape("<f8", ("modalities", "pair_sums"))]
    brier: Annotated[Floats, Shape("<f8", ("predicted", "brier_sums"))]
    life_table: Annotated[Floats, Shape("<f8", ("main_arms", "life_cells"))]
    calibration: Annotated[Floats, Shape("<f8", ("main_arms", "calibration_cells"))]
    observed_expected: Annotated[Floats, Shape("<f8", ("main_arms", "expected_sums"))]
    subgroup_pairs: Annotated[Floats, Shape("<f8", ("levels", "pair_sums"))]
    subgroup_expected: Annotated[Floats, Shape("<f8", ("levels", "expected_sums"))]
    decision: Annotated[Floats, Shape("<f8", ("decision_sums",))]
    treatment: Annotated[Floats, Shape("<f8", ("treatment_cells",))]


@dataclass(frozen=True)
class Done:
    """Site: an instruction was carried out."""


@dataclass(frozen=True)
class Refused:
    """Site: nothing leaves, for this reason."""

    code: str


Message = (
    Introduce | Introduced | Describe | Description | AskKey | Key | SetKeys | Masked
    | AskPrivateSteps | PrivateSteps | AskMoments | DesignMoments | SetScaling | AskProducts
    | Products | SetComponents | AskSums | Sums | SetEncoders | AskUpdates | Updates | SetNetworks
    | AskEdges | Edges | SetGrid | AskIntervals | Intervals | AskEvaluation | Evaluation | Done
    | Refused
)  # fmt: skip
_TYPES: Final[dict[str, type]] = {kind.__name__: kind for kind in get_args(Message)}
_HINTS: Final = {name: get_type_hints(kind, include_extras=True) for name, kind in _TYPES.items()}
# Names come one per row of the arrays beside them, and before them in every message.
_NAMED_DIM: Final = {"designs": "fits", "settings": "sites"}
_DIGESTS: Final = ("protocol", "code", "consortium", "settings", "cohort", "run")
_CODES: Final = frozenset(get_args(Refusal))


def encode(message: Message) -> bytes:
    """Write a message to bytes, after checking it against its schema.

    Raises
    ------
    MessageError
        If a field has another type, shape or dtype than declared, or a value is not finite.
    """
    kind = type(message).__name__
    values = {f.name: getattr(message, f.name) for f in fields(message)}
    _check(kind, values)
    shapes = _array_shapes(kind)
    header = {"kind": kind, "values": {}, "arrays": {}}
    body = []
    for name, value in values.items():
        if name in shapes:
            header["arrays"][name] = list(value.shape)  # type: ignore[index]
            body.append(np.ascontiguousarray(value, dtype=shapes[name].dtype).tobytes())
        else:
            header["values"][name] = list(value) if isinstance(value, tuple) else value  # type: ignore[index]
    text = json.dumps(header, sort_keys=True, allow_nan=False).encode()
    payload = b"".join([_HEADER.pack(_MAGIC, len(text)), text, *body])
    if len(payload) > MAX_BYTES:
        raise MessageError(f"{kind}: found {len(payload)} bytes, needed at most {MAX_BYTES}")
    return payload


def decode(payload: bytes) -> Message:
    """Read a message from bytes that may come from anyone.

    Raises
    ------
    MessageError
        If the bytes are not exactly one message of this list with every field as declared.
    """
    if len(payload) > MAX_BYTES:
        raise MessageError(f"message: found {len(payload)} bytes, needed at most {MAX_BYTES}")
    try:
        magic, size = _HEADER.unpack_from(payload)
        if magic != _MAGIC:
            raise MessageError("message: does not begin as one")
        if size > _MAX_HEADER_BYTES:
            raise MessageError(f"message: found a header of {size} bytes, needed fewer")
        header = json.loads(payload[_HEADER.size : _HEADER.size + size])
        kind, plain, sizes = header["kind"], header["values"], header["arrays"]
        arrays = set(_array_shapes(kind))
        fields_found = (set(header), set(plain), set(sizes))
        if fields_found != ({"kind", "values", "arrays"}, set(_HINTS[kind]) - arrays, arrays):
            raise MessageError(f"{kind}: found other fields than the schema has")
        values = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in plain.items()
        }
        values.update(_read_arrays(kind, sizes, payload[_HEADER.size + size :]))
    except MessageError:
        raise
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise MessageError("message: found bytes that are no message of this list") from None
    _check(kind, values)
    message: Message = _TYPES[kind](**values)
    return message


def _array_shapes(kind: str) -> dict[str, Shape]:
    return {
        name: get_args(hint)[1]
        for name, hint in _HINTS[kind].items()
        if get_origin(hint) is Annotated
    }


def _read_arrays(kind: str, sizes: dict[str, list[int]], body: bytes) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    at = 0
    for name, shape in _array_shapes(kind).items():
        dims = sizes[name]
        if not all(isinstance(d, int) and 0 <= d <= MAX_BYTES for d in dims):
            raise MessageError(f"{kind}.{name}: found sizes that are no sizes")
        dtype = np.dtype(shape.dtype)
        n_bytes = int(np.prod(dims, dtype=object)) * dtype.itemsize
        if at + n_bytes > len(body):
            raise MessageError(f"{kind}.{name}: found fewer bytes than its shape needs")
        raw = np.frombuffer(body, dtype=np.uint8, count=n_bytes, offset=at)
        if dtype.kind == "b" and raw.size and raw.max() > 1:
            raise MessageError(f"{kind}.{name}: found bytes that are neither true nor false")
        arrays[name] = raw.view(dtype).reshape(dims)
        at += n_bytes
    if at != len(body):
        raise MessageError(f"{kind}: found {len(body) - at} bytes too many")
    return arrays


def _check(kind: str, values: dict[str, Any]) -> None:
    sizes: dict[str, int] = {}
    shapes = _array_shapes(kind)
    for name, hint in _HINTS[kind].items():
        where = f"{kind}.{name}"
        if name in shapes:
            _check_array(where, values[name], shapes[name], sizes)
        else:
            _check_plain(where, values[name], hint)
            if isinstance(values[name], tuple):
                dim, size = _NAMED_DIM.get(name, name), len(values[name])
                if sizes.setdefault(dim, size) != size:
                    raise MessageError(f"{where}: found {size} {dim}, needed {sizes[dim]}")


def _check_array(where: str, value: Any, shape: Shape, sizes: dict[str, int]) -> None:
    if not isinstance(value, np.ndarray) or value.dtype.str != shape.dtype:
        raise MessageError(f"{where}: needed an array of dtype {shape.dtype}")
    if value.ndim != len(shape.dims):
        raise MessageError(f"{where}: found {value.ndim} dimensions, needed {len(shape.dims)}")
    for dim, size in zip(shape.dims, value.shape, strict=True):
        needed = int(dim) if dim.isdigit() else sizes.setdefault(dim, size)
        if size != needed:
            raise MessageError(f"{where}: found {size} {dim}, needed {needed}")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise MessageError(f"{where}: found a value that is not finite")


def _check_plain(where: str, value: Any, hint: Any) -> None:
    if hint is str:
        _check_text(where, value)
    elif hint is float:
        if not isinstance(value, float) or not np.isfinite(value):
            raise MessageError(f"{where}: needed a finite number")
    elif hint is bool:
        if not isinstance(value, bool):
            raise MessageError(f"{where}: needed true or false")
    elif hint is int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
            raise MessageError(f"{where}: needed a count")
    elif not isinstance(value, tuple) or not 0 < len(value) <= 10_000:
        raise MessageError(f"{where}: needed a list of names")
    else:
        for name in value:
            _check_text(where, name)


def _check_text(where: str, value: Any) -> None:
    field = where.partition(".")[2]
    if not isinstance(value, str):
        raise MessageError(f"{where}: needed text")
    if where == "Refused.code":
        allowed = value in _CODES
    elif field in _DIGESTS:
        allowed = _DIGEST.fullmatch(value) is not None
    else:
        allowed = _NAME.fullmatch(value) is not None
    if not allowed:
        raise MessageError(f"{where}: found text that the schema does not allow")
