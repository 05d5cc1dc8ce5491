"""Refits a profile's predictions from a run: one factor for each term of the cost model."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from hetcomp.bench import BenchRecord, read_record
from hetcomp.errors import HetcompError
from hetcomp.hardware.figures import Calibration
from hetcomp.hardware.profile import HardwareProfile

# A term that a run spends less than this of its time in cannot be judged by it.
LEAST_SHARE = 0.005
# What one run may correct: beyond this the profile is of another machine, or was measured while it was busy.
_LOWEST, _HIGHEST = 0.2, 5.0
# What Calibration allows for all runs together.
_LEAST_FACTOR, _MOST_FACTOR = 0.05, 20.0


def calibrated(profile: HardwareProfile, record: BenchRecord) -> HardwareProfile:
    """The profile with a factor for every term that the record says enough about, multiplied into earlier ones.

    A term's factor is the ratio of sums, measured (median of the rounds) over predicted, over the record's cases, each
    weighted so that all cases count alike. Raises HetcompError if the record is of another profile or machine, or asks
    for a correction by more than five times.
    """
    if record.cpu != profile.cpu or record.threads != profile.threads:
        raise HetcompError(
            f"The bench record is of {record.cpu} with {record.threads} threads, the profile of {profile.cpu} with "
            f"{profile.threads}; calibrate on the machine that the profile describes."
        )
    if record.profile_sha256 != profile.sha256():
        raise HetcompError(
            f"The bench record was predicted with another profile ({record.profile_name}); run hetcomp bench again "
            "with this one and calibrate from that."
        )
    predicted: dict[str, float] = defaultdict(float)
    measured: dict[str, float] = defaultdict(float)
    for case in record.cases:
        for role in case.roles:
            predicted[role.term] += role.predicted_ms / case.measured_ms
            measured[role.term] += role.typical_ms / case.measured_ms
    fitted = []
    for term in sorted(predicted):
        if predicted[term] <= 0 or measured[term] < LEAST_SHARE * len(record.cases):
            continue
        factor = measured[term] / predicted[term]
        if not _LOWEST < factor < _HIGHEST:
            raise HetcompError(
                f"The run says that {term} takes {factor:.2f} times the predicted time; that is no correction but "
                "another machine state. Run hetcomp profile again on a quiet machine."
            )
        whole = factor * profile.calibration(term)
        if not _LEAST_FACTOR < whole < _MOST_FACTOR:
            raise HetcompError(
                f"With earlier calibrations {term} would be corrected by {whole:.2f} times; run hetcomp profile again "
                "instead of correcting the old one."
            )
        fitted.append(Calibration(term=term, factor=whole, run=record.plan_sha256, measured_at=record.measured_at))
    kept = tuple(c for c in profile.calibrations if c.term not in {f.term for f in fitted})
    return profile.model_copy(update={"calibrations": (*kept, *fitted)})


def calibrated_from(profile: HardwareProfile, path: Path) -> HardwareProfile:
    """As :func:`calibrated`, from a stored record."""
    return calibrated(profile, read_record(path))
