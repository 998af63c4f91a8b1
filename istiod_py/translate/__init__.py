"""Kubernetes objects into what node proxies need: pure functions from objects to the values of `mesh.model`."""

from istiod_py.translate.config import AncestorStatus, Condition, Config, ParentStatus, StatusEntry
from istiod_py.translate.translation import Translation, translate

__all__ = ["AncestorStatus", "Condition", "Config", "ParentStatus", "StatusEntry", "Translation", "translate"]
