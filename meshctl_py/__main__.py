"""``meshctl``: the command line of the mesh."""

from __future__ import annotations

import io
import sys
from importlib import import_module
from typing import Final

import click

_HELP: Final = {"help_option_names": ["-h", "--help"]}
_COMMANDS: Final = {
    "install": ("install", "install"),
    "label": ("label", "label"),
    "lab": ("lab", "lab"),
    "node": ("node", "node"),
    "status": ("status", "status"),
    "uninstall": ("install", "uninstall"),
    "version": ("status", "show_version"),
    "waypoint": ("waypoint", "waypoint"),
}
"""By its name a command's module in `meshctl_py.commands`, and what it is called there."""


class _Commands(click.Group):
    """Imports a command when it is asked for: to read every kind of Kubernetes takes longer than to ask a lab how it is."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name]
        command = getattr(import_module(f"meshctl_py.commands.{module}"), name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Commands, context_settings=_HELP)
def main() -> None:
    """Install the mesh in a cluster, enrol workloads, deploy waypoints, look into agents, and run a whole mesh on this machine."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no tick must not end a command in its middle


if __name__ == "__main__":
    main()
