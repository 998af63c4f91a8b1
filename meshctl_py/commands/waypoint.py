"""``meshctl waypoint``: ask for waypoints, see how they are, and take them away, with istioctl's words."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, TypeAlias, TypeVar

import click
import trio

from mesh.model.labels import TRAFFIC_TYPES
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.lab.home import LabError
from meshctl_py.target import ClusterFlags, choose_place, cluster_flags, find_follower, run_on_cluster
from meshctl_py.waypoints.actions import Wanted, apply_waypoint, build, delete_waypoints, list_waypoints, show_status
from meshctl_py.waypoints.gateway import DEFAULT_NAME, as_yaml
from meshctl_py.waypoints.place import ClusterWaypoints, DirectoryWaypoints, WaypointPlace

_P = ParamSpec("_P")
_T = TypeVar("_T")

_NAMESPACE: Final = "Namespace of the waypoint; by default the context's, or 'default' in a directory."
_UNITS: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}

Act: TypeAlias = Callable[[Callable[[WaypointPlace], Awaitable[None]]], None]
"""Does something in the place that is meant."""


class _Duration(click.ParamType[float]):
    """``90s``, ``1m30s``: seconds."""

    name = "DURATION"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value)
        parts = re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s)", text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            self.fail(f"{text!r} is no duration such as 90s or 1m30s", param, ctx)
        return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _in_place(command: Callable[Concatenate[Act, str, _P], _T]) -> Callable[_P, _T]:
    """Gives a command what carries out its work, in the cluster or directory that is meant, and the namespace that was named."""

    @click.option(
        "-f",
        "--directory",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="Work on the YAML of this directory, whether or not a lab runs.",
    )
    @click.option("--lab", "lab_name", metavar="LAB", help="Work on the YAML of this lab's directory.")
    @wraps(command)
    def run(flags: ClusterFlags, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        directory, lab_name = kwargs.pop("directory"), kwargs.pop("lab_name")
        assert directory is None or isinstance(directory, Path)
        assert lab_name is None or isinstance(lab_name, str)
        return command(_choose(flags, directory, lab_name), flags.namespace, *args, **kwargs)

    return cluster_flags(namespace=_NAMESPACE)(run)


def _choose(flags: ClusterFlags, directory: Path | None, lab_name: str | None) -> Act:
    lab = choose_place(flags, lab_name) if directory is None else None
    if directory is None and lab is None:
        return lambda work: run_on_cluster(flags, lambda client: work(ClusterWaypoints(client)))
    try:
        lab = find_follower(directory) if directory is not None else lab
        source = directory if directory is not None or lab is None else Path(lab.status().source)
        assert source is not None
        place = DirectoryWaypoints(source, lab.home.status_of("istiod") if lab is not None else None)
    except LabError as exc:
        raise click.ClickException(str(exc)) from exc

    def act(work: Callable[[WaypointPlace], Awaitable[None]]) -> None:
        try:
            trio.run(work, place)
        except ClusterProblem as exc:
            raise click.ClickException(str(exc)) from exc

    return act


_name = click.option("--name", default=DEFAULT_NAME, show_default=True, metavar="NAME", help="Name of the waypoint.")
_for = click.option("--for", "traffic", default="", metavar="TYPE", help=f"Traffic it takes: {', '.join(TRAFFIC_TYPES)}.")
_revision = click.option("-r", "--revision", default="", metavar="REV", help="The revision to label the waypoint with.")
_timeout = click.option("--waypoint-timeout", "timeout", type=_Duration(), default="90s", show_default=True, help="How long to wait.")


@click.group()
def waypoint() -> None:
    """Ask for waypoints, see how they are, and take them away."""


@waypoint.command()
@_name
@_for
@_revision
@click.option("-n", "--namespace", default="", metavar="NS", help="Namespace of the waypoint; without it none is written.")
def generate(name: str, traffic: str, revision: str, namespace: str) -> None:
    """Print a waypoint as YAML."""
    try:
        click.echo(as_yaml(build(name, namespace, traffic, revision)), nl=False)
    except ClusterProblem as exc:
        raise click.ClickException(str(exc)) from exc


@waypoint.command()
@_name
@_for
@_revision
@click.option("--enroll-namespace", is_flag=True, help="Label the namespace, so that its services have this waypoint.")
@click.option("--overwrite", is_flag=True, help="Enroll a namespace that has another waypoint.")
@click.option("-w", "--wait", is_flag=True, help="Wait until the waypoint is ready.")
@_timeout
@_in_place
def apply(
    act: Act, namespace: str, name: str, traffic: str, revision: str, enroll_namespace: bool, overwrite: bool, wait: bool, timeout: float
) -> None:
    """Apply a waypoint: the control plane deploys it."""
    wanted = Wanted(name, namespace, traffic, revision, enroll_namespace, overwrite, wait, timeout)
    act(lambda place: apply_waypoint(place, wanted, click.echo))


@waypoint.command()
@click.argument("names", nargs=-1, metavar="[NAME ...]")
@click.option("--all", "everything", is_flag=True, help="All waypoints of the namespace.")
@click.option("-r", "--revision", default="", metavar="REV", help="All waypoints of this revision in the namespace.")
@_in_place
def delete(act: Act, namespace: str, names: tuple[str, ...], everything: bool, revision: str) -> None:
    """Delete waypoints, and with them what was deployed for them."""
    if (everything or revision) and names:
        raise click.UsageError("cannot specify waypoint names when deleting all waypoints")
    if not (everything or revision or names):
        raise click.UsageError("must specify a waypoint name or delete all using --all or delete specific revision using --revision")
    act(lambda place: delete_waypoints(place, namespace, names, click.echo, everything=everything, revision=revision))


@waypoint.command("list")
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="Of all namespaces.")
@_in_place
def list_all(act: Act, namespace: str, everywhere: bool) -> None:
    """List waypoints."""
    act(lambda place: list_waypoints(place, namespace, click.echo, everywhere=everywhere))


@waypoint.command()
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="Of all namespaces.")
@click.option("--wait/--no-wait", "-w", default=True, show_default=True, help="Wait until all are programmed.")
@_timeout
@_in_place
def status(act: Act, namespace: str, everywhere: bool, wait: bool, timeout: float) -> None:
    """Show whether waypoints are programmed, and if not why."""
    act(lambda place: show_status(place, namespace, click.echo, everywhere=everywhere, wait_within=timeout if wait else None))
