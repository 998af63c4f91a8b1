"""How properties are tried.

Hypothesis' deadline is a timed assertion: on a machine shared with other work it fails by chance, so no property has one. CI tries the
same examples every time, so that what it says of a change is about the change; everywhere else they are new ones each run.
"""

import os

from hypothesis import settings

settings.register_profile("mesh", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("mesh")
