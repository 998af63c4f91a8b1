"""``meshctl``: the command line of the mesh."""

from __future__ import annotations

import io
import sys

import click

from meshctl_py.commands.install import install, uninstall
from meshctl_py.commands.lab import lab
from meshctl_py.commands.label import label
from meshctl_py.commands.node import node
from meshctl_py.commands.status import show_version, status
from meshctl_py.commands.waypoint import waypoint

_HELP = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=_HELP)
def main() -> None:
    """Install the mesh in a cluster, enrol workloads, deploy waypoints, look into agents, and run a whole mesh on this machine."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no tick must not end a command in its middle


for command in (install, uninstall, status, show_version, label, waypoint, node, lab):
    main.add_command(command)

if __name__ == "__main__":
    main()
