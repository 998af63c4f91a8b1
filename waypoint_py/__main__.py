"""``waypoint-py [proxy|version|help]``."""

from __future__ import annotations

import gc
import sys

_USAGE = """\
usage: waypoint-py [proxy | version | help]

  proxy     run the waypoint (the default); configured by the environment: docs/reference/waypoint.md
  version   print the version
  help      print this
"""


def main() -> None:
    """Entry point of the console script; exits with the status of what it ran."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    match arguments:
        case [] | ["proxy", *_]:  # Istio's deployments say ``proxy waypoint`` and more
            gc.disable()  # looking for garbage while modules are made is a tenth of the start; the program sees to it from then on
            from waypoint_py.app import run_waypoint

            return run_waypoint()
        case ["version" | "--version"]:
            from importlib.metadata import version

            from mesh.runtime.build import BUILD_STATUS

            print(f"waypoint-py {version('ambient-mesh')} ({BUILD_STATUS})")
            return 0
        case ["help" | "-h" | "--help"]:
            print(_USAGE, end="")
            return 0
        case [command, *_]:
            print(f"unknown command: {command}\n\n{_USAGE}", end="", file=sys.stderr)
            return 1
    return 1


if __name__ == "__main__":
    main()
