"""Hypothesis' deadline is a timed assertion: on a machine shared with other work it fails by chance, so no property has one."""

from hypothesis import settings

settings.register_profile("mesh", deadline=None)
settings.load_profile("mesh")
