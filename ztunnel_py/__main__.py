"""``ztunnel-py [proxy|mover spare|version|help]``; ``brain`` and other movers are how the agent starts its own parts."""

from __future__ import annotations

import sys

_USAGE = """\
usage: ztunnel-py [proxy | mover spare | version | help]

  proxy     run the node agent (the default); configured by the environment: docs/reference/ztunnel.md
  mover spare
            run one of its movers beside it, so that it outlives the agent
  version   print the version
  help      print this
"""


def main() -> None:
    """Entry point of the console script; exits with the status of what it ran."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    # Each kind of process imports only what it runs: the supervisor stays small, a mover never loads the brain.
    match arguments:
        case [] | ["proxy"]:
            from ztunnel_py.supervisor import Supervisor

            return Supervisor([sys.executable, "-m", "ztunnel_py", "brain"]).run()
        case ["brain"]:
            from ztunnel_py.brain.processes import start_early

            early = start_early()
            from ztunnel_py.brain.app import run_brain

            return run_brain(early)
        case ["mover", name]:
            from ztunnel_py.mover.app import run_mover

            return run_mover(name)
        case ["version" | "--version"]:
            from importlib.metadata import version

            from mesh.runtime.build import BUILD_STATUS

            print(f"ztunnel-py {version('ambient-mesh')} ({BUILD_STATUS})")
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
