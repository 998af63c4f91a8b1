"""``meshctl install`` and ``meshctl uninstall``: the mesh into a cluster, and out of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import click
import trio

from mesh.kube.api import ApiClient
from meshctl_py import render
from meshctl_py.cluster import uninstall as removing
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.install import Plan, apply_plan, check_cluster, in_order
from meshctl_py.cluster.inventory import read_installation
from meshctl_py.cluster.manifests import load_manifests
from meshctl_py.cluster.rollout import Unready, find_unready, wait_ready
from meshctl_py.cluster.values import Given, as_values, configure, merge, read_values
from meshctl_py.table import as_yaml
from meshctl_py.target import ClusterFlags, cluster_flags, run_on_cluster

INSTALL_TIMEOUT: Final = 300.0
UNINSTALL_TIMEOUT: Final = 180.0


def _tell(name: str, what: str) -> None:
    click.echo(f"{name} {what}")


@click.command()
@click.option("--image", default="", metavar="IMAGE[:TAG]", help="The project's image where your nodes can get it.")
@click.option("-f", "--values", "files", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="Values in YAML; repeat.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A value, such as istiod.replicas=2; repeat.")
@click.option("--reset-values", "reset", is_flag=True, help="Forget the values of the last installation.")
@click.option(
    "--dry-run",
    is_flag=False,
    flag_value="client",
    type=click.Choice(["client", "server"]),
    help="client: only print the objects. server: ask the API server what would change.",
)
@click.option("--wait/--no-wait", default=True, show_default=True, help="Whether to wait until everything is ready.")
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=INSTALL_TIMEOUT, show_default=True, help="Seconds until everything must be ready."
)
@cluster_flags()
def install(
    flags: ClusterFlags,
    image: str,
    files: tuple[Path, ...],
    settings: tuple[str, ...],
    reset: bool,
    dry_run: str | None,
    wait: bool,
    timeout: float,
) -> None:
    """Install the mesh in a cluster, or bring the one that is there to this version and these values.

    Values are those of the Helm chart (deploy/chart/values.yaml). Those of the last installation are kept, unless others are given. Nothing
    is captured by this: 'meshctl label namespace NS istio.io/dataplane-mode=ambient' does that.
    """
    try:
        given = read_values(files, settings, image)
        if dry_run == "client":
            objects = in_order(configure(load_manifests(), as_values(given)))
            click.echo(as_yaml(*objects))
            return
    except ClusterProblem as exc:
        raise click.ClickException(str(exc)) from exc
    run_on_cluster(flags, lambda client: _install(client, given, reset=reset, dry_run=dry_run == "server", wait=wait, patience=timeout))


async def _install(client: ApiClient, given: Given, *, reset: bool, dry_run: bool, wait: bool, patience: float) -> None:
    began = trio.current_time()
    await check_cluster(client)
    before = await read_installation(client)
    if before is not None and before.values and not reset:
        given = merge(before.values, given)
        click.echo("keeping the values of the last installation (--reset-values forgets them)")
    objects = configure(load_manifests(), as_values(given))
    await apply_plan(client, Plan(in_order(objects), given), _tell, dry_run=dry_run)
    if dry_run:
        return
    if wait:
        with render.progress() as progress:
            progress.show("waiting until all is ready:", [])
            shown: list[Unready] = []

            def show(unready: list[Unready]) -> None:
                nonlocal shown
                if unready and unready != shown:
                    shown = unready
                    progress.show("waiting until all is ready:", [(item.name, item.because) for item in unready])

            try:
                await wait_ready(client, patience, show)
            except BaseException:
                progress.finish()
                raise
            progress.finish(ready=True)
    elif await find_unready(client):
        click.echo("not everything is ready yet: 'meshctl status'")
    click.echo(f"the mesh is installed after {trio.current_time() - began:.1f} s")
    click.echo("  try: meshctl label namespace NS istio.io/dataplane-mode=ambient")
    click.echo("  see: meshctl status")


@click.command()
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--purge", is_flag=True, help="Delete our CustomResourceDefinitions too, and with them all policies. Istio's own stay.")
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=UNINSTALL_TIMEOUT, show_default=True, help="Seconds that each step may take."
)
@cluster_flags()
def uninstall(flags: ClusterFlags, yes: bool, purge: bool, timeout: float) -> None:
    """Take the mesh out of a cluster.

    Pods run on: agents release them first, then everything that 'meshctl install' or 'kubectl apply -k deploy/' made is removed, and what
    the control plane made of its own: waypoints, root certificates, statuses. Your labels, Gateways, routes and policies stay.
    """
    left = run_on_cluster(flags, lambda client: _uninstall(client, flags, yes=yes, purge=purge, patience=timeout))
    if left:
        for line in left:
            click.echo(line, err=True)
        sys.exit(1)


async def _uninstall(client: ApiClient, flags: ClusterFlags, *, yes: bool, purge: bool, patience: float) -> list[str]:
    began = trio.current_time()
    removal = await removing.plan_removal(client, load_manifests(), purge=purge)
    if removal is None:
        click.echo("the mesh is not installed in this cluster")
        return []
    if not yes:
        for line in removing.describe(removal):
            click.echo(line)
        _confirm(f"Uninstall from {client.access.host}:{client.access.port} ({client.access.origin})?")
    with render.progress() as progress:
        progress.show("agents release their pods:", [])
        try:
            captured = await removing.release_pods(client, patience, lambda pending: progress.show("agents release their pods:", pending))
        finally:
            progress.finish()
    left = await removing.remove_rest(client, removal, patience, _tell)
    click.echo(f"the mesh is gone after {trio.current_time() - began:.1f} s")
    return [*captured, *left]


def _confirm(question: str) -> None:
    """Raises ClusterProblem where there is nobody to ask; click.Abort on no."""
    if not sys.stdin.isatty():
        raise ClusterProblem("nobody can be asked here: give -y to uninstall without a question")
    click.confirm(question, abort=True)
