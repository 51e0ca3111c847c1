"""A site's own registry: its encoders as signed versions that stay where they were trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from flows.identity import public_key
from flows.mlflow_store import client_of
from flows.model_signing import verify_model
from flows.protocol import load_protocol
from flows.site_registry import (
    encoder_folder,
    register_encoders,
    registered_encoders,
    site_tracking_uri,
    unregistered,
)
from infra.settings import Workspace
from tests.lineages import SITES, leave_encoders, prepare, write_raw, write_study

if TYPE_CHECKING:
    from pathlib import Path

    from flows.protocol import StudyProtocol
    from infra.settings import SiteSettings

KINDS = {"clinical", "pathology", "radiology"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[SiteSettings, StudyProtocol, str]:
    """A site whose encoders are registered, and the digest of their cohort."""
    workspace = write_study(tmp_path_factory.mktemp("sites"), sites=SITES[:1])
    settings, protocol = workspace.site(SITES[0]), load_protocol(workspace.study_file)
    cohort = leave_encoders(settings, protocol)
    assert set(unregistered(settings, protocol, cohort)) == KINDS
    assert register_encoders(settings, protocol, cohort) == 3
    return settings, protocol, cohort


def test_each_encoder_is_a_version_with_card_tags_and_curve(
    site: tuple[SiteSettings, StudyProtocol, str],
) -> None:
    settings, protocol, cohort = site
    client = client_of(site_tracking_uri(settings))
    for modality in KINDS:
        (version,) = client.search_model_versions(f"name = 'lung-os-{modality}-encoder'")
        assert version.tags["consilium.cohort"] == cohort
        assert version.tags["consilium.spec"] == protocol.modality[modality].fingerprint()
        assert version.tags["consilium.signed_by"] == public_key(settings.home)
        assert "torch " in version.tags["consilium.libraries"]
        assert "never leaves this site" in version.description
        (points,) = (
            client.get_metric_history(version.run_id, x)
            for x in client.get_run(version.run_id).data.metrics
        )
        assert [(x.step, x.value) for x in points] == [(0, 1.5), (1, 1.25)]


def test_the_weights_are_kept_signed_by_the_site(
    site: tuple[SiteSettings, StudyProtocol, str],
) -> None:
    settings, _, _ = site
    own = public_key(settings.home)
    assert own is not None
    for encoder in registered_encoders(settings):
        folder = encoder_folder(settings, encoder)
        assert folder is not None
        signed = verify_model(folder, [own])
        assert signed.files["encoder.safetensors"] == encoder.weights
        kept = settings.path("encoders", encoder.modality, "encoder.safetensors")
        assert (folder / "encoder.safetensors").read_bytes() == kept.read_bytes()


def test_nothing_is_registered_twice(site: tuple[SiteSettings, StudyProtocol, str]) -> None:
    settings, protocol, cohort = site
    before = registered_encoders(settings)
    assert unregistered(settings, protocol, cohort) == {}
    assert register_encoders(settings, protocol, cohort) == 0
    settings.path("runs", "encoders.json").unlink()  # as after a kill between the two
    assert register_encoders(settings, protocol, cohort) == 3
    assert registered_encoders(settings) == before


def test_encoders_of_another_cohort_wait_for_their_own_training(
    site: tuple[SiteSettings, StudyProtocol, str],
) -> None:
    settings, protocol, _ = site
    assert unregistered(settings, protocol, "0" * 64) == {}


def test_trained_again_an_encoder_becomes_the_next_version(
    site: tuple[SiteSettings, StudyProtocol, str], tmp_path: Path
) -> None:
    _, protocol, _ = site
    root = tmp_path / "other"
    workspace = write_study(root, sites=SITES[:1])
    settings = workspace.site(SITES[0])
    for n in (24, 40):
        if n > 24:
            raw = tmp_path / f"raw-{n}"
            write_raw(raw, SITES[0], seed=0, n=n)
            for path in raw.glob("*.csv"):
                path.replace(settings.path(path.name))
            prepare(settings, protocol)
        cohort = leave_encoders(settings, protocol)
        weights = settings.path("encoders", "clinical", "encoder.safetensors")
        weights.write_bytes(np.arange(n, dtype=np.float64).tobytes())
        register_encoders(settings, protocol, cohort)
    versions = [x.version for x in registered_encoders(settings) if x.modality == "clinical"]
    assert versions == [1, 2]


def test_a_site_without_encoders_makes_no_store(tmp_path: Path) -> None:
    write_raw(tmp_path / SITES[0], SITES[0], seed=1)
    settings = Workspace(root=tmp_path).site(SITES[0])
    assert registered_encoders(settings) == []
    assert not settings.path("runs").exists()
