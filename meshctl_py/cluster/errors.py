"""What the user of a cluster must act on."""

from __future__ import annotations


class ClusterProblem(Exception):
    """The text says what is in the way and what to do next."""
