"""Which endpoints are left alone for a while because of how they answered: Envoy's outlier detection as Istio configures it. Pure.

Only what real requests taught is used (passive health); nobody is probed. Success-rate detection is off in Istio, and so not here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import Final

from mesh.model.l7.destination import OutlierDetection

LONGEST_EJECTION: Final = 300.0
"""Seconds (Envoy's ``max_ejection_time``); or the base time, if that is longer."""
_GATEWAY_ERRORS: Final = frozenset({502, 503, 504})


class LocalOutcome(Enum):
    """What happened on our side of a connection to the endpoint, before any answer of the application's."""

    CONNECTED = "connected"
    FAILED = "failed"
    """Refused, reset, or not within its time."""


@dataclass(slots=True)
class Health:
    """What is remembered of one endpoint. ``ejected_at`` None: it takes requests."""

    errors: int = 0
    gateway_errors: int = 0
    local_failures: int = 0
    ejected_at: float | None = None
    ejections: int = 0
    """How often it was ejected lately: each makes the next last longer, and an interval of good conduct takes one off."""
    because: str = ""


class OutlierDetector:
    """The endpoints of one destination. ``now`` in seconds of one clock; `sweep` must be called before health is asked for."""

    def __init__(self, config: OutlierDetection) -> None:
        self.config = config
        self._next_sweep: float | None = None

    def follow(self, before: OutlierDetector) -> None:
        """Go on with the rhythm of the one that this one replaces."""
        self._next_sweep = before._next_sweep

    def answered(self, health: Health, status: int, everybody: Collection[Health], now: float) -> bool:
        """The application answered. Returns whether the endpoint was ejected for it."""
        if status < 500:
            health.errors = health.gateway_errors = 0
            return False
        health.errors += 1
        health.gateway_errors = health.gateway_errors + 1 if status in _GATEWAY_ERRORS else 0
        config = self.config
        if config.consecutive_5xx and health.errors >= config.consecutive_5xx:
            return self._eject(health, f"{health.errors} answers in a row were 5xx", everybody, now)
        if config.consecutive_gateway_errors and health.gateway_errors >= config.consecutive_gateway_errors:
            return self._eject(health, f"{health.gateway_errors} answers in a row were 502, 503 or 504", everybody, now)
        return False

    def happened_here(self, health: Health, outcome: LocalOutcome, everybody: Collection[Health], now: float) -> bool:
        """A connection was made or failed. Returns whether the endpoint was ejected for it. Unless the two are told apart
        (``splitExternalLocalOriginErrors``), a failure counts as an answer of 503 and a success as none."""
        config = self.config
        if not config.split_local_origin:
            return outcome is LocalOutcome.FAILED and self.answered(health, 503, everybody, now)
        if outcome is LocalOutcome.CONNECTED:
            health.local_failures = 0
            return False
        health.local_failures += 1
        most = config.consecutive_local_origin_failures
        if most and health.local_failures >= most:
            return self._eject(health, f"{health.local_failures} connections in a row failed", everybody, now)
        return False

    def sweep(self, everybody: Collection[Health], now: float) -> bool:
        """Let those whose time is over take requests again; does anything once an interval. Returns whether anything changed."""
        if self._next_sweep is None:
            self._next_sweep = now + self.config.interval
        if now < self._next_sweep:
            return False
        self._next_sweep = now + self.config.interval
        changed = False
        for health in everybody:
            if health.ejected_at is None:
                health.ejections = max(0, health.ejections - 1)
            elif now >= health.ejected_at + self._lasts(health):
                health.ejected_at = None
                health.errors = health.gateway_errors = health.local_failures = 0
                health.because = ""
                changed = True
        return changed

    def _lasts(self, health: Health) -> float:
        base = self.config.base_ejection_time
        return min(base * health.ejections, max(base, LONGEST_EJECTION))

    def _eject(self, health: Health, because: str, everybody: Collection[Health], now: float) -> bool:
        ejected = sum(1 for other in everybody if other.ejected_at is not None)
        # Asked before it is ejected, so that one endpoint may always be, however few there are.
        if health.ejected_at is not None or ejected * 100 >= self.config.max_ejection_percent * len(everybody):
            return False
        health.ejected_at = now
        health.ejections += 1
        health.because = because
        return True
