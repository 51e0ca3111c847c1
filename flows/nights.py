"""What the last night of a site came to: when it ended, and counts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from modalities.files import replacing

if TYPE_CHECKING:
    from infra.settings import SiteSettings

_FILE: Final = "last_night.json"


@dataclass(frozen=True)
class Night:
    """A finished run of ``prepare-site``.

    Attributes
    ----------
    began, ended
        In UTC, as ISO 8601.
    n_patients, n_extracted, n_excluded
        Patients of the draft cohort, inputs extracted, and inputs set aside.
    """

    began: str
    ended: str
    n_patients: int
    n_extracted: int
    n_excluded: int


def write_night(settings: SiteSettings, night: Night) -> None:
    """Keep what the last night came to."""
    with replacing(settings.path(_FILE)) as temporary:
        temporary.write_text(json.dumps(asdict(night), indent=1))


def read_night(settings: SiteSettings) -> Night | None:
    """Read what the last night came to; None before the first that ended."""
    try:
        return Night(**json.loads(settings.path(_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None
