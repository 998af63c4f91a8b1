"""``meshctl status`` and ``meshctl version``: how the mesh of a cluster is, and which versions run."""

from __future__ import annotations

import os
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import click
import msgspec
from rich.text import Text

from mesh.kube.kubeconfig import kubeconfig_files
from meshctl_py.cluster.report import Report, gather
from meshctl_py.table import OUT, Table, as_time, colour_state, show_data
from meshctl_py.target import ClusterFlags, cluster_flags, run_on_cluster


@click.command()
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table", help="As tables, JSON or YAML.")
@cluster_flags()
def status(flags: ClusterFlags, output: str) -> None:
    """Show the control plane and the agents of a cluster, and what is wrong with them.

    Exit status 1: something is, or the mesh is not installed.
    """
    report = run_on_cluster(flags, gather)
    if output != "table":
        show_data(report, output)
    elif not report.installed:
        OUT.print("the mesh is not installed in this cluster: 'meshctl install'", markup=False)
    else:
        _show(report)
    if not report.installed or report.wrong:
        sys.exit(1)


def _show(report: Report) -> None:
    ready = sum(replica.ready for replica in report.control_plane)
    OUT.print(f"control plane: {ready} of {report.desired_replicas} replicas ready\n", markup=False)
    replicas = Table("REPLICA", "NODE", "READY", "VERSION", "AGENTS", "PROBLEMS", "AUTHORITY ENDS", "BECAUSE")
    for replica in report.control_plane:
        figures = (replica.version, str(replica.agents), str(replica.problems), as_time(replica.authority_expires))
        replicas.add_row(replica.pod, replica.node, _ready(replica.ready), *figures, replica.because)
    agents = Table("NODE", "AGENT", "READY", "VERSION", "CAPTURED", "PENDING", "CONFIGURATION", "CERTIFICATES", "NEXT ENDS", "BECAUSE")
    for agent in report.agents:
        agents.add_row(
            *(agent.node, agent.pod, _ready(agent.ready), agent.version, str(agent.captured)),
            colour_state(str(agent.pending), agent.pending == 0),
            colour_state(agent.configuration, agent.configuration == "in sync"),
            *(str(agent.certificates), as_time(agent.next_expiry), agent.because),
        )
    for table in (replicas, agents):
        if table.rows:
            table.print()
            OUT.print()
    if report.wrong:
        OUT.print("what is wrong:", style="bold")
        for line in report.wrong:
            OUT.print(colour_state(f"  {line}", False))
    else:
        OUT.print("all is well", markup=False)


def _ready(ready: bool) -> Text:
    return colour_state("yes" if ready else "no", ready)


class _Versions(msgspec.Struct, rename="camel"):
    client: str
    control_plane: dict[str, int]
    agents: dict[str, int]
    """How many of each version."""


@click.command("version")
@click.option("--client", "client_only", is_flag=True, help="Only this program's own.")
@click.option("-o", "--output", type=click.Choice(["short", "json", "yaml"]), default="short", help="As lines, JSON or YAML.")
@cluster_flags()
def show_version(flags: ClusterFlags, client_only: bool, output: str) -> None:
    """Print the versions of this program, and of control plane and agents where there is a cluster."""
    ours = version("ambient-mesh")
    found = _Versions(ours, {}, {})
    if not client_only and (flags.chosen or kubeconfig_files(os.environ, Path.home()) or os.environ.get("KUBERNETES_SERVICE_HOST")):
        if output == "short":
            click.echo(f"client version: {ours}")
        report = run_on_cluster(flags, gather)
        found.control_plane = dict(Counter(replica.version or "unknown" for replica in report.control_plane))
        found.agents = dict(Counter(agent.version or "unknown" for agent in report.agents))
        if output == "short":
            _show_versions(report, found)
            return
    elif output == "short":
        click.echo(f"client version: {ours}")
        return
    show_data(found, output)


def _show_versions(report: Report, found: _Versions) -> None:
    if not report.installed:
        click.echo("the mesh is not installed in this cluster")
        return
    click.echo(f"control plane version: {', '.join(sorted(found.control_plane)) or 'none'}")
    agents = ", ".join(f"{each} ({count} {'agent' if count == 1 else 'agents'})" for each, count in sorted(found.agents.items()))
    click.echo(f"data plane version: {agents or 'none'}")
