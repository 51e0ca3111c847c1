"""The door of a site: who may begin a run, before any row is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion import messages as m
from fusion.federation.designs import NotReleased
from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fusion.federation.site import SiteStudy
    from fusion.privacy import Refusal


class SiteGate:
    """Lets one approved run in, and hands every later request to the site's part in it.

    Parameters
    ----------
    permits
        Says why an introduction is turned away, or None if it is not.
    cohort
        Gives the digest, under the site's secret, of the cohort that would take part.
    open_study
        Makes the site's part in the run of this name; called once.
    on_error
        Called with any exception, for the site's own log; only a code leaves.
    """

    def __init__(
        self,
        *,
        permits: Callable[[m.Introduce], Refusal | None],
        cohort: Callable[[], str],
        open_study: Callable[[str], SiteStudy],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._permits, self._cohort, self._open_study = permits, cohort, open_study
        self._on_error = on_error
        self._introduced = False
        self._study: SiteStudy | None = None

    def answer(self, payload: bytes) -> bytes:
        """Answer one request; whatever goes wrong leaves as a code."""
        try:
            request = m.decode(payload)
            if isinstance(request, m.Introduce):
                return m.encode(self._introduce(request))
            if not self._introduced:
                raise NotReleased("not_approved")
            return self._part(request).answer(payload)
        except NotReleased as refusal:
            return m.encode(m.Refused(refusal.code))
        except DataError as error:
            self._on_error(error)
            code = "withdrawn" if error.code == "withdrawn" else "site_error"
            return m.encode(m.Refused(code))
        except m.MessageError as error:
            self._on_error(error)
            return m.encode(m.Refused("malformed_request"))
        except Exception as error:  # noqa: BLE001
            self._on_error(error)
            return m.encode(m.Refused("site_error"))

    def _introduce(self, request: m.Introduce) -> m.Introduced:
        refusal = self._permits(request)
        if refusal is not None:
            raise NotReleased(refusal)
        found = m.Introduced(self._cohort())
        self._introduced = True
        return found

    def _part(self, request: m.Message) -> SiteStudy:
        if self._study is None:
            # Left-out runs have names that follow from the study's own, which comes first.
            if not isinstance(request, m.Describe):
                raise NotReleased("malformed_request")
            self._study = self._open_study(request.run)
        return self._study
