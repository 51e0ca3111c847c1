"""The study: what the science is, the same at every site, with no path and no address in it."""

from __future__ import annotations

import difflib
import re
import tomllib
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from flows.subgroups import level_names
from fusion.differential_privacy import Budget
from fusion.encoder_spec import EncoderSpec, random_projection
from fusion.federation import RESERVED_NAMES, AveragingPlan, FederationPlan
from fusion.late import RIDGES
from fusion.late.gated import initial_gated_weights
from fusion.privacy import MinimumCounts
from modalities.clinical import ClinicalSpec
from modalities.files import fingerprint
from modalities.omics import OmicsSpec
from modalities.pathology import PathologySpec, UnknownEncoder, check_encoder_name
from modalities.radiology import RadiologySpec, feature_names
from modalities.tabular import TabularSpec

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

ModalitySpec = PathologySpec | RadiologySpec | OmicsSpec | ClinicalSpec | TabularSpec
KINDS: dict[str, type[ModalitySpec]] = {
    "pathology": PathologySpec,
    "radiology": RadiologySpec,
    "omics": OmicsSpec,
    "clinical": ClinicalSpec,
    "tabular": TabularSpec,
}
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_STUDY_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")
Days = Annotated[float, Field(gt=0, le=36525, allow_inf_nan=False)]


class ProtocolError(ValueError):
    """A ``study.toml`` that cannot be run; the message names each key at fault."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StudySection(_Section):
    """What is studied, and on which time grid."""

    name: str = Field(description="short name, lower case, of the study and its models")
    endpoint: str = Field(default="overall survival", min_length=1, max_length=200)
    data: Literal["patients", "public", "simulated"] = Field(
        default="patients", description="minimum counts may be lowered for the last two only"
    )
    horizon_days: Days = Field(description="time of calibration, one of the grid's edges")
    grid_days: tuple[Days, ...] = Field(
        min_length=2, max_length=12, description="right ends of the intervals, increasing"
    )
    test_fraction: float = Field(default=0.3, gt=0.05, lt=0.6)
    seed: int = Field(default=0, ge=0, lt=2**31, description="of training and of projections")

    @field_validator("name")
    @classmethod
    def _name_is_short(cls, name: str) -> str:
        if not _STUDY_NAME.fullmatch(name):
            raise ValueError("needed lower-case letters, digits and hyphens, a letter first")
        return name

    @model_validator(mode="after")
    def _grid_is_possible(self) -> Self:
        if list(self.grid_days) != sorted(set(self.grid_days)):
            raise ValueError(f"grid_days: found {list(self.grid_days)}, needed increasing days")
        if self.horizon_days not in self.grid_days:
            raise ValueError(
                f"horizon_days: found {self.horizon_days:g}, needed one of grid_days "
                f"{[f'{d:g}' for d in self.grid_days]}"
            )
        return self


class FusionSection(_Section):
    """The late-fusion model."""

    model: Literal["cox", "logistic_hazard", "gated"] = Field(
        default="cox",
        description="cox: ridge Cox, stratified by site, fitted by federated Newton; "
        "logistic_hazard: discrete time on the grid, with an intercept per site that stays there; "
        "gated: a small network that weighs the modalities by which are there, by averaging",
    )
    ridge: tuple[Annotated[float, Field(ge=0, le=100)], ...] = Field(
        default=RIDGES,
        min_length=1,
        max_length=32,
        description="penalties per patient, increasing; several are chosen from by the held-out "
        "partial likelihood of sites, never on test data",
    )
    folds: int = Field(default=5, ge=2, le=20, description="folds of cross-fitting")
    hidden: int = Field(default=4, ge=1, le=64, description="hidden units of a gated model")
    averaging: Literal["fedavg", "fedprox", "fedadam"] = Field(
        default="fedavg", description="how a gated model's weights are combined"
    )
    rounds: int = Field(default=30, ge=1, le=500, description="rounds of averaging, at most")
    local_steps: int = Field(default=5, ge=1, le=1000, description="steps of a site in a round")
    learning_rate: float = Field(default=0.3, gt=0, le=10, description="of a local step")
    proximal: float = Field(default=0.01, ge=0, le=100, description="pull of fedprox")

    @field_validator("ridge", mode="before")
    @classmethod
    def _one_or_several(cls, ridge: Any) -> Any:
        is_number = isinstance(ridge, int | float) and not isinstance(ridge, bool)
        return (ridge,) if is_number else ridge

    @field_validator("ridge")
    @classmethod
    def _ridge_increases(cls, ridge: tuple[float, ...]) -> tuple[float, ...]:
        if list(ridge) != sorted(set(ridge)):
            raise ValueError(f"found {list(ridge)}, needed increasing penalties, each once")
        return ridge


class EvaluationSection(_Section):
    """What is reported of the test patients beyond the standard figures."""

    subgroups: dict[str, tuple[float, ...]] = Field(
        default_factory=dict,
        description="clinical column to the bounds between its levels, in its own unit; empty for "
        "a column whose levels are listed",
    )
    treatment: str = Field(
        default="", description="categorical clinical column whose levels are compared"
    )
    thresholds: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.1, 0.2, 0.3, 0.4, 0.5),
        max_length=12,
        description="risks by the horizon at which net benefit is computed, increasing",
    )
    leave_one_site_out: bool = Field(
        default=False,
        description="repeat the study without each training site and evaluate it there; shows the "
        "coordinator what each site adds to a sum",
    )

    @field_validator("thresholds")
    @classmethod
    def _thresholds_increase(cls, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        if list(thresholds) != sorted(set(thresholds)):
            raise ValueError(f"found {list(thresholds)}, needed increasing risks")
        return thresholds


class FederationSection(_Section):
    """How sums are added, and who must be there."""

    sums: Literal["plain", "secure_sum"] = Field(
        default="plain",
        description="plain: the coordinator sees each site's sums; secure_sum: it sees those of at "
        "least three sites together, and nothing is told of differences between sites",
    )
    min_sites: int = Field(default=1, ge=1, le=1000, description="training sites a run needs")
    timeout_s: float = Field(
        default=300.0, gt=0, le=86_400, description="after which a silent site has left the run"
    )


class GateSection(_Section):
    """What a candidate must reach before anyone is asked to promote it."""

    min_sites: int = Field(default=2, ge=2)
    min_test_events: int = Field(default=10, ge=1)
    min_concordance: float = Field(
        default=0.5, ge=0, le=1, description="reached by the lower end of the interval"
    )
    max_champion_loss: float = Field(
        default=0.02, ge=0, le=1, description="of concordance, against the champion"
    )
    min_calibration_slope: float = Field(default=0.7, gt=0, le=1)
    max_calibration_slope: float = Field(default=1.4, ge=1, le=10)
    min_observed_expected: float = Field(default=0.67, gt=0, le=1)
    max_observed_expected: float = Field(default=1.5, ge=1, le=10)
    min_left_out_concordance: float = Field(
        default=0.5, ge=0, le=1, description="where each training site is left out in turn"
    )


NOT_STATED = "not stated by the study lead"
Statement = Annotated[str, Field(min_length=1, max_length=2000)]


class GovernanceSection(_Section):
    """What no run can know and a model's dossier has to say, in the study lead's words."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    intended_use: Statement = Field(
        default=NOT_STATED, description="whom the model is for, when, and what it may inform"
    )
    population: Statement = Field(
        default=NOT_STATED, description="which patients are in the cohorts, and who is left out"
    )
    ethics: Statement = Field(
        default=NOT_STATED, description="approvals with their numbers, and consent or its waiver"
    )
    funding: Statement = Field(default=NOT_STATED, description="who pays, and their part")
    contact_role: Statement = Field(
        default=NOT_STATED, description="role to turn to, such as the study office; no person"
    )


class StudyProtocol(_Section):
    """A frozen, validated ``study.toml``."""

    schema_version: Literal[1] = 1
    study: StudySection
    modality: dict[str, Annotated[ModalitySpec, Field()]]
    encoder: dict[str, EncoderSpec] = Field(default_factory=dict)
    fusion: FusionSection = FusionSection()
    evaluation: EvaluationSection = EvaluationSection()
    federation: FederationSection = FederationSection()
    privacy: MinimumCounts = MinimumCounts()
    differential_privacy: Budget = Budget()
    gates: GateSection = GateSection()
    governance: GovernanceSection = GovernanceSection()

    @field_validator("modality", mode="before")
    @classmethod
    def _spec_of_kind(cls, sections: Any) -> Any:
        if not isinstance(sections, dict) or not sections:
            raise ValueError("found none, needed at least one [modality.NAME] section")
        return {name: _read_spec(name, section) for name, section in sections.items()}

    @model_validator(mode="before")
    @classmethod
    def _default_encoders(cls, values: Any) -> Any:
        """Give every modality an encoder, and every encoder the defaults of its kind."""
        sections = values.get("modality") if isinstance(values, dict) else None
        given = values.get("encoder", {}) if isinstance(values, dict) else None
        if not isinstance(sections, dict) or not isinstance(given, dict):
            return values
        encoders = dict(given)
        for name, section in sections.items():
            default = _default_encoder(section)
            if name not in encoders:
                encoders[name] = default
            elif isinstance(encoders[name], dict):
                encoders[name] = {**default, **encoders[name]}
        return {**values, "encoder": encoders}

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        clinical = [x for x, spec in self.modality.items() if isinstance(spec, ClinicalSpec)]
        if len(clinical) != 1:
            raise ValueError(
                f"modality: found {len(clinical)} of kind clinical, needed exactly one, which also "
                "reads the outcome"
            )
        for name in self.encoder:
            if name not in self.modality:
                raise ValueError(f"encoder.{name}: found no [modality.{name}]")
        for name in self.modality:
            self._check_encoder(name)
        self._check_evaluation()
        self._check_weights()
        if self.evaluation.leave_one_site_out and self.federation.sums == "secure_sum":
            raise ValueError(
                "evaluation.leave_one_site_out: found it with secure sums, needed plain ones, "
                "because a total less the total without a site is that site's sum"
            )
        if len(self.study.grid_days) > self.privacy.intervals:
            raise ValueError(
                f"study.grid_days: found {len(self.study.grid_days)} intervals, needed at most "
                f"{self.privacy.intervals} (privacy.intervals); join some"
            )
        if self.differential_privacy.is_on:
            self._check_private()
        lowered = self.privacy.lowered()
        if lowered and self.study.data == "patients":
            raise ValueError(
                f"privacy.{lowered[0].split()[0]}: found {lowered[0]}; lower minimums are for "
                "study.data simulated or public only"
            )
        return self

    def _check_evaluation(self) -> None:
        spec = self.modality[self.clinical]
        assert isinstance(spec, ClinicalSpec)
        for variable, cuts in self.evaluation.subgroups.items():
            try:
                level_names(spec, variable, cuts)
            except ValueError as error:
                raise ValueError(f"evaluation.subgroups.{error}") from None
        treatment = self.evaluation.treatment
        if treatment in self.evaluation.subgroups:
            raise ValueError(
                f"evaluation.treatment: found {treatment} among the subgroups too, needed it once, "
                "because its levels are compared by risk group"
            )
        if treatment and treatment not in spec.categorical:
            raise ValueError(
                f"evaluation.treatment: found {treatment}, needed a categorical column of "
                f"[modality.{self.clinical}]: {', '.join(sorted(spec.categorical)) or 'none'}"
            )

    def _check_weights(self) -> None:
        """Let weights of patients' networks cross as totals only, after each site's own audit."""
        sharing = [
            f"encoder.{x}.sharing" for x, e in self.encoder.items() if e.sharing == "weights"
        ]
        shared = [*sharing, *(["fusion.model"] if self.fusion.model == "gated" else [])]
        if shared and self.study.data == "patients" and self.federation.sums != "secure_sum":
            raise ValueError(
                f"{shared[0]}: found a network trained by averaging weights, which can tell who "
                "was trained on, needed federation.sums secure_sum, or study.data simulated or "
                "public"
            )

    def _check_private(self) -> None:
        """Noise is made for linear models of sums, and for nothing else that would leave."""
        beyond = [f"encoder.{x}.sharing" for x, e in self.encoder.items() if e.sharing == "weights"]
        beyond += [f"encoder.{x}.l1_ratio" for x, e in self.encoder.items() if e.l1_ratio]
        beyond += ["fusion.model"] if self.fusion.model != "cox" else []
        beyond += ["evaluation.leave_one_site_out"] if self.evaluation.leave_one_site_out else []
        if beyond:
            raise ValueError(
                f"{beyond[0]}: found it beside differential_privacy.epsilon, needed encoders that "
                "share sums or nothing, without l1, a cox fusion model, and no site left out"
            )

    def audited(self) -> tuple[str, ...]:
        """Models whose weights leave a site only after its own membership audit let them."""
        if self.study.data != "patients":
            return ()
        networks = tuple(x for x in self.modalities if self.encoder[x].sharing == "weights")
        return networks + (("fusion",) if self.fusion.model == "gated" else ())

    def _check_encoder(self, name: str) -> None:
        spec, encoder = self.modality[name], self.encoder[name]
        if encoder.reads_tiles != isinstance(spec, PathologySpec):
            raise ValueError(
                f"encoder.{name}.model: found {encoder.model}, needed one that reads "
                f"{'tiles' if isinstance(spec, PathologySpec) else 'a table'}"
            )
        if isinstance(spec, PathologySpec):
            return
        known = self.feature_names(name)
        unknown = [x for x in encoder.inputs if known and x not in known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"encoder.{name}.inputs: found unknown {unknown[0]}{hint}")
        if encoder.sharing == "sums":
            self._check_sums(name, encoder)
        if encoder.sharing == "weights" and encoder.harmonise == "none":
            raise ValueError(
                f"encoder.{name}.harmonise: found none, needed site, because a network's inputs "
                "must be of one scale at every site"
            )
        if encoder.sharing == "weights" and not self.encoder_inputs(name):
            raise ValueError(
                f"encoder.{name}.inputs: sharing weights needs the same inputs at every site; name "
                f"them here or in modality.{name}.columns"
            )

    def _check_sums(self, name: str, encoder: EncoderSpec) -> None:
        n_inputs = len(self.encoder_inputs(name))
        if n_inputs > encoder.max_inputs and encoder.harmonise == "none":
            raise ValueError(
                f"encoder.{name}.harmonise: found none, needed site, because {n_inputs} inputs are "
                f"projected to {encoder.max_inputs}"
            )
        if n_inputs == 0:
            raise ValueError(
                f"encoder.{name}.inputs: sharing sums needs the same inputs at every site; name "
                f"them here or in modality.{name}.columns"
            )

    def feature_names(self, name: str) -> tuple[str, ...]:
        """Names of the features that a modality's extractor gives; empty if a file decides."""
        spec = self.modality[name]
        if isinstance(spec, RadiologySpec):
            return feature_names(spec)
        if isinstance(spec, OmicsSpec):
            return tuple(spec.panel) if spec.output == "panel" else tuple(sorted(spec.gene_sets))
        if isinstance(spec, ClinicalSpec):
            return spec.feature_names
        return spec.columns if isinstance(spec, TabularSpec) else ()

    def encoder_inputs(self, name: str) -> tuple[str, ...]:
        """Names of the inputs of a table encoder, before any projection."""
        return self.encoder[name].inputs or self.feature_names(name)

    def projection(self, name: str, n_inputs: int) -> NDArray[np.float64] | None:
        """(n_inputs, k) random projection of a modality shared as sums, or None where few."""
        encoder = self.encoder[name]
        if n_inputs <= encoder.max_inputs:
            return None
        return random_projection(n_inputs, encoder.max_inputs, encoder.projection_seed)

    def sums_inputs(self) -> dict[str, tuple[str, ...]]:
        """Per modality shared as sums, the names of its encoder's inputs after projection."""
        found = {}
        for name, encoder in self.encoder.items():
            if encoder.sharing == "sums":
                names = self.encoder_inputs(name)
                if encoder.reads_tiles or len(names) > encoder.max_inputs:
                    names = tuple(f"projection_{i}" for i in range(encoder.max_inputs))
                found[name] = names
        return found

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names in a fixed order, which is that of the fusion model's inputs."""
        return tuple(sorted(self.modality))

    @property
    def clinical(self) -> str:
        """Name of the modality that reads the registry."""
        return next(x for x, spec in self.modality.items() if isinstance(spec, ClinicalSpec))

    def values(self) -> dict[str, Any]:
        """Give the whole protocol as plain values, kinds and defaults included."""
        values = self.model_dump(mode="json")
        for name, spec in self.modality.items():
            values["modality"][name]["kind"] = kind_of(spec)
        return values

    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of :meth:`values`."""
        return fingerprint(self.values())

    def plan(self, run: str, *, minimum: MinimumCounts | None = None) -> FederationPlan:
        """Give the part that the federation runs on.

        Parameters
        ----------
        minimum
            Limits that hold at a site in place of the protocol's.
        """
        sums = self.sums_inputs()
        return FederationPlan(
            run=run,
            protocol=self.fingerprint(),
            modalities=self.modalities,
            sums=sums,
            networks=self._networks(),
            encoder_ridge={name: self.encoder[name].ridge for name in sums},
            l1_ratio={name: self.encoder[name].l1_ratio for name in sums},
            components=self._components(sums),
            fusion_model=self.fusion.model,
            fusion_ridge=self.fusion.ridge,
            gating=self._gating(),
            gating_hidden=self.fusion.hidden,
            n_folds=self.fusion.folds,
            edges_days=self.study.grid_days,
            horizon_days=self.study.horizon_days,
            subgroups=self.subgroups(),
            treatments=self.treatments(),
            thresholds=self.evaluation.thresholds,
            leave_one_site_out=self.evaluation.leave_one_site_out,
            secure_sum=self.federation.sums == "secure_sum",
            budget=self.differential_privacy,
            min_sites=self.federation.min_sites,
            minimum=self.privacy if minimum is None else minimum,
            study=self.study.name,
        )

    def _components(self, sums: dict[str, tuple[str, ...]]) -> dict[str, int]:
        kept = {name: self.encoder[name].components for name in sums}
        return {x: k for x, k in kept.items() if k is not None and k < len(sums[x])}

    def _gating(self) -> AveragingPlan | None:
        if self.fusion.model != "gated":
            return None
        return AveragingPlan(
            start=initial_gated_weights(
                np.zeros(2 * len(self.modality)), hidden=self.fusion.hidden
            ),
            rule=self.fusion.averaging,
            rounds=self.fusion.rounds,
            local_steps=self.fusion.local_steps,
            learning_rate=self.fusion.learning_rate,
            proximal=self.fusion.proximal if self.fusion.averaging == "fedprox" else 0.0,
        )

    def _networks(self) -> dict[str, AveragingPlan]:
        named = [x for x in self.modalities if self.encoder[x].sharing == "weights"]
        if not named:
            return {}
        # Torch takes seconds to import, and only networks need it.
        from fusion.shared_networks import initial_weights

        found = {}
        for name in named:
            spec = self.encoder[name]
            n_inputs = spec.n_components if spec.reads_tiles else len(self.encoder_inputs(name))
            found[name] = AveragingPlan(
                start=initial_weights(spec, n_inputs, seed=self.study.seed),
                rule=spec.averaging,
                rounds=spec.rounds,
                local_steps=spec.local_steps,
                learning_rate=spec.local_learning_rate,
                proximal=spec.proximal if spec.averaging == "fedprox" else 0.0,
            )
        return found

    def subgroups(self) -> dict[str, tuple[str, ...]]:
        """Per variable of the subgroups, the names of its levels."""
        spec = self.modality[self.clinical]
        return {
            variable: level_names(spec, variable, cuts)  # type: ignore[arg-type]
            for variable, cuts in sorted(self.evaluation.subgroups.items())
        }

    def treatments(self) -> tuple[str, ...]:
        """Levels of the treatment; none where no comparison is asked for."""
        if not self.evaluation.treatment:
            return ()
        spec = self.modality[self.clinical]
        return spec.categorical[self.evaluation.treatment]  # type: ignore[union-attr]


def kind_of(spec: ModalitySpec) -> str:
    """Name of a spec's kind, as written in ``study.toml``."""
    return next(kind for kind, cls in KINDS.items() if type(spec) is cls)


def load_protocol(path: Path) -> StudyProtocol:
    """Read and validate a ``study.toml``.

    Raises
    ------
    ProtocolError
        If the file is missing or no TOML, a key is unknown, or a value is impossible; the message
        names every key at fault.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ProtocolError(
            f"{path.name}: found no such file; write one with `consilium study init NAME`"
        ) from None
    except (OSError, UnicodeDecodeError):
        raise ProtocolError(f"{path.name}: needed a readable text file in UTF-8") from None
    return read_protocol_text(text, source=path.name)


def read_protocol_text(text: str, *, source: str) -> StudyProtocol:
    """Validate the text of a ``study.toml``.

    Raises
    ------
    ProtocolError
        As :func:`load_protocol`.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProtocolError(f"{source}: found no valid TOML: {error}") from None
    return read_protocol(values, source=source)


def read_protocol(values: dict[str, Any], *, source: str = "study.toml") -> StudyProtocol:
    """Validate a protocol given as plain values.

    Raises
    ------
    ProtocolError
        As :func:`load_protocol`.
    """
    try:
        return StudyProtocol.model_validate(values)
    except ValidationError as error:
        raise ProtocolError(describe_errors(error, source=source)) from None


def describe_errors(error: ValidationError, *, source: str) -> str:
    """One line per key at fault: the key, what was found, what was needed."""
    problems = error.errors()
    # A list whose item is at fault counts as without it, and then as too short.
    behind = {problem["loc"][:-1] for problem in problems}
    return "\n".join(
        _describe(dict(problem), source)
        for problem in problems
        if problem["type"] != "too_short" or problem["loc"] not in behind
    )


def _describe(problem: dict[str, Any], source: str) -> str:
    # Names of the classes of a union stand in pydantic's location; a reader knows keys only.
    keys = [str(x) for x in problem["loc"] if str(x) not in {c.__name__ for c in KINDS.values()}]
    key = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        hint = _hint(keys)
        return f"{source}: {key}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{source}: {key}: found nothing, needed a value"
    text = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        # A section's validator names the key below it; a key's own does not.
        between = ": " if text.startswith(("found ", "needed ")) else "."
        return f"{source}: {key}{between}{text}" if key else f"{source}: {text}"
    return f"{source}: {key}: {text[0].lower() + text[1:]}, found {problem['input']!r}"


def _hint(keys: list[str]) -> str:
    section: dict[str, type[BaseModel]] = {
        "study": StudySection, "fusion": FusionSection, "federation": FederationSection,
        "privacy": MinimumCounts, "gates": GateSection, "encoder": EncoderSpec,
        "evaluation": EvaluationSection, "differential_privacy": Budget,
        "governance": GovernanceSection,
    }  # fmt: skip
    known: list[str] = (
        list(section[keys[0]].model_fields)
        if keys[0] in section and len(keys) > 1
        else list(StudyProtocol.model_fields)
    )
    stem = keys[-1].rsplit("_", 1)[0]
    near = [x for x in known if x.rsplit("_", 1)[0] == stem]
    near = near or difflib.get_close_matches(keys[-1], known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _read_spec(name: str, section: Any) -> Any:
    if isinstance(section, tuple(KINDS.values())):
        return section
    if not _NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise ValueError(f"{name}: needed a name of lower-case letters, digits and underscores")
    if not isinstance(section, dict) or section.get("kind") not in list(KINDS):
        found = section.get("kind") if isinstance(section, dict) else section
        raise ValueError(f"{name}.kind: found {found!r}, needed one of {', '.join(KINDS)}")
    kind = section["kind"]
    try:
        spec = KINDS[kind].model_validate({k: v for k, v in section.items() if k != "kind"})
    except ValidationError as error:
        raise ValueError(_first_fault(name, error, KINDS[kind])) from None
    if isinstance(spec, PathologySpec):
        try:
            check_encoder_name(spec.encoder)
        except UnknownEncoder as error:
            raise ValueError(f"{name}.encoder: {error}") from None
    return spec


def _first_fault(name: str, error: ValidationError, spec: type[BaseModel]) -> str:
    problem = error.errors()[0]
    key = ".".join(map(str, problem["loc"]))
    text = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, list(spec.model_fields), n=1)
        text = "unknown key" + (f"; did you mean {near[0]}?" if near else "")
    return f"{name}.{key}: {text}" if key else f"{name}: {text}"


def _default_encoder(section: Any) -> dict[str, str]:
    """Gated attention that stays at the site for slides, linear sums for tables."""
    kind = section.get("kind") if isinstance(section, dict) else None
    kind = next((k for k, cls in KINDS.items() if type(section) is cls), kind)
    if kind == "pathology":
        return {"model": "gated_attention", "sharing": "local", "harmonise": "site"}
    # Age and stage mean the same everywhere; measurements carry their machine's level.
    harmonise = "none" if kind == "clinical" else "site"
    return {"model": "linear", "sharing": "sums", "harmonise": harmonise}
