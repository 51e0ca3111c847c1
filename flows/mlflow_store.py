"""One MLflow store, of the coordinator or of a site: reached quietly, naming no account."""

from __future__ import annotations

import importlib
import logging
import os
import re
import time
import warnings
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from modalities.files import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from infra.settings import Workspace

SQLITE: Final = "sqlite:///"
# MLflow would otherwise name the account and the script's path.
OWNER_TAGS: Final = {
    "mlflow.user": "consilium",
    "mlflow.source.name": "consilium",
    "mlflow.source.type": "JOB",
}
_MODELS: Final = "models:/"
_VERSION: Final = re.compile(r"([^/@:]+)(?:@([^/@]+)|/([0-9]{1,9}))")


class RegistryError(RuntimeError):
    """A registry, or a part of the installation that it needs, that cannot be used."""


def quiet_mlflow() -> None:
    """Keep MLflow from calling home, from chatting, and from copying files it finds around it."""
    os.environ.update(
        MLFLOW_DISABLE_TELEMETRY="true",
        DO_NOT_TRACK="true",
        MLFLOW_UV_AUTO_DETECT="false",
        MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING="false",
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true",
        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false",
    )
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def client_of(tracking_uri: str) -> MlflowClient:
    """Reach a store; the first time in a process it takes seconds."""
    quiet_mlflow()
    with ignoring_warnings():
        from mlflow import MlflowClient

        # Importing MLflow sets its loggers up, once more to be kept quiet.
        quiet_mlflow()
        return MlflowClient(tracking_uri, tracking_uri)


@contextmanager
def ignoring_warnings() -> Iterator[None]:
    """Keep what MLflow and its libraries warn of themselves from the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def database_of(tracking_uri: str) -> Path:
    """File of a SQLite store."""
    return Path(tracking_uri.removeprefix(SQLITE))


@contextmanager
def tracking_at(tracking_uri: str) -> Iterator[None]:
    """Set the process's tracking address, which MLflow's database store asks for the new model."""
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(tracking_uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return time.time_ns() // 1_000_000


def quietly_imported(module: str) -> Any:
    """Import a module of MLflow, which takes seconds, without its warnings."""
    quiet_mlflow()
    with ignoring_warnings():
        found = importlib.import_module(module)
    quiet_mlflow()
    return found


def make_store(tracking_uri: str) -> None:
    """Make the database of a SQLite store that is not there yet."""
    if not tracking_uri.startswith(SQLITE) or database_of(tracking_uri).exists():
        return
    content = _empty_store()
    with replacing(database_of(tracking_uri)) as temporary:
        temporary.write_bytes(content)


@lru_cache(maxsize=1)
def _empty_store() -> bytes:
    """Make the database of a store without runs, once: its migrations take seconds."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        client_of(f"{SQLITE}{path}").search_experiments()
        return path.read_bytes()


def version_at(client: MlflowClient, uri: str) -> ModelVersion:
    """Find the version that ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION`` means.

    Raises
    ------
    RegistryError
        If it means none.
    """
    from mlflow.exceptions import MlflowException

    name, alias, version = _named(uri)
    try:
        if alias:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, version)
    except MlflowException:
        raise RegistryError(
            f"model: found no {uri.removeprefix(_MODELS)} in the registry, needed a registered "
            "version; see `consilium ui`"
        ) from None


def _named(uri: str) -> tuple[str, str, str]:
    found = _VERSION.fullmatch(uri.removeprefix(_MODELS))
    if found is None:
        raise RegistryError(
            f"model: found {uri!r}, needed models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    name, alias, version = found.groups(default="")
    return name, alias, version


def model_folder(uri: str, workspace: Workspace) -> Path | None:
    """Find a registered model's folder below the study's, where it is kept there.

    A study's folder may have been moved or copied since MLflow noted the path.

    Raises
    ------
    RegistryError
        If the registry has no such version.
    """
    if not uri.startswith(_MODELS):
        return None
    version = version_at(client_of(workspace.mlflow_uri), uri)
    return artifacts_below(workspace.root, "models", model_id_of(version))


def model_id_of(version: ModelVersion) -> str:
    """Give the id of the logged model behind a version, which an alias' answer leaves out."""
    return str(version.model_id or version.source.removeprefix(_MODELS))


def artifacts_below(root: Path, *parts: str) -> Path | None:
    """Find the folder of a run's or a model's artifacts below a party's; None if kept elsewhere."""
    where = "/".join(parts)
    return next(iter(sorted(root.glob(f"artifacts/*/{where}/artifacts"))), None)
