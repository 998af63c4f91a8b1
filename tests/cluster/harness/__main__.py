"""``python -m tests.cluster.harness``: bring a cluster up to play with, look at it, load the code's image into it, end it."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path

import click

from tests.cluster.harness.build import build_helm, why_not, why_not_at_once
from tests.cluster.harness.client import Options, bury_the_dead, find_cluster, prepare, start_cluster
from tests.cluster.harness.home import ClusterError, find_clusters
from tests.cluster.harness.progress import tell

_NAME = click.option("--name", default="dev", show_default=True, help="Which cluster.")


@click.group(help=__doc__)
def main() -> None: ...


@main.command()
@click.option("--built", is_flag=True, help="Also where it would have to be built first, which takes minutes.")
def check(built: bool) -> None:
    """Say why no cluster can run here, and end with status 3; or end well."""
    reason = why_not() or (why_not_at_once() if built else None)
    if reason is not None:
        click.echo(f"no cluster on this machine: {reason}")
        sys.exit(3)


@main.command("prepare")
def prepare_command() -> None:
    """Build everything that clusters and the tests on them need: some ten minutes the first time."""
    prepare()
    build_helm()


@main.command()
@_NAME
@click.option("--nodes", default=2, show_default=True)
@click.option("--dual-stack/--ipv4", default=True, show_default=True, help="Whether pods have IPv6 addresses too.")
def up(name: str, nodes: int, dual_stack: bool) -> None:
    """Bring a cluster up, and leave it running."""
    prepare()
    began = time.monotonic()
    cluster = start_cluster(name, Options(nodes=nodes, dual_stack=dual_stack), tell)
    tell(f"{nodes} nodes ready after {time.monotonic() - began:.1f} s")
    click.echo(f"export KUBECONFIG={cluster.kubeconfig}")
    click.echo(f"export PATH={cluster.settings.programs}:$PATH   # kubectl")


@main.command()
@_NAME
def down(name: str) -> None:
    """End a cluster, and remove what killed ones left."""
    for home in find_clusters():
        if home.name == name and home.alive:
            find_cluster(name).end()
            tell(f"cluster {name} is gone")
    bury_the_dead()


@main.command()
@_NAME
def status(name: str) -> None:
    """The cluster's own programs."""
    cluster = find_cluster(name)
    for program in cluster.programs().values():
        click.echo(f"{program.name:26} {program.state:8} starts {program.starts} {program.last_exit}")
    click.echo(f"logs: {cluster.home.logs}")


@main.command()
@_NAME
def load(name: str) -> None:
    """Build the project's image of the code as it is now, and load it into all nodes."""
    find_cluster(name).load_project()


@main.command("exec", context_settings={"ignore_unknown_options": True})
@_NAME
@click.argument("node")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_command(name: str, node: str, command: tuple[str, ...]) -> None:
    """Run a program on a node, as root there."""
    argv = find_cluster(name).node(node).command(*command)
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    try:
        main(prog_name=f"{shlex.quote(Path(sys.executable).name)} -m tests.cluster.harness")
    except ClusterError as exc:
        sys.exit(f"error: {exc}")
