"""``meshctl``: the command line of the mesh."""

from __future__ import annotations

from importlib.metadata import version

import click

from meshctl_py.commands.lab import lab
from meshctl_py.commands.label import label

_HELP = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=_HELP)
def main() -> None:
    """Enrol workloads in the mesh, and run a whole mesh on this machine."""


@main.command("version")
def show_version() -> None:
    """Print the version."""
    click.echo(f"meshctl {version('ambient-mesh')}")


main.add_command(lab)
main.add_command(label)

if __name__ == "__main__":
    main()
