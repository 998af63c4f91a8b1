"""What a command acts on: a cluster, found by kubectl's flags and rules, or a lab on this machine."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, TypeVar

import click
import trio

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.kubeconfig import ClusterAccess, KubeconfigError, NoKubeconfigError, Overrides, choose_access, kubeconfig_files
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.lab.client import Lab
from meshctl_py.lab.home import LabError, choose_lab, find_labs

_P = ParamSpec("_P")
_T = TypeVar("_T")

_HINTS: Final = {
    401: "the API server does not know these credentials: log in again, or choose another --context or --user",
    403: "ask for the right, or choose another --context or --user",
}


@dataclass(frozen=True, slots=True)
class ClusterFlags:
    """kubectl's flags; empty: as the kubeconfig has it."""

    kubeconfig: Path | None = None
    context: str = ""
    cluster: str = ""
    user: str = ""
    namespace: str = ""

    @property
    def chosen(self) -> bool:
        """Whether a cluster was asked for, and not only a namespace."""
        return bool(self.kubeconfig or self.context or self.cluster or self.user)

    def find_access(self) -> ClusterAccess:
        """Raises KubeconfigError."""
        return choose_access(self.kubeconfig, Overrides(self.context, self.cluster, self.user, self.namespace))


def cluster_flags(*, namespace: str = "") -> Callable[[Callable[Concatenate[ClusterFlags, _P], _T]], Callable[_P, _T]]:
    """Gives a command kubectl's flags as its first argument. ``namespace``: what -n means; without it there is no such flag."""

    def decorate(command: Callable[Concatenate[ClusterFlags, _P], _T]) -> Callable[_P, _T]:
        @click.option("--kubeconfig", type=click.Path(path_type=Path), metavar="FILE", help="Instead of KUBECONFIG and ~/.kube/config.")
        @click.option("--context", default="", metavar="NAME", help="The kubeconfig's context to use.")
        @click.option("--cluster", default="", metavar="NAME", help="The kubeconfig's cluster to use.")
        @click.option("--user", default="", metavar="NAME", help="The kubeconfig's user to be.")
        @wraps(command)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            words = {name: str(kwargs.pop(name, "") or "") for name in ("context", "cluster", "user", "namespace")}
            kubeconfig = kwargs.pop("kubeconfig")
            assert kubeconfig is None or isinstance(kubeconfig, Path)
            return command(ClusterFlags(kubeconfig, **words), *args, **kwargs)

        return click.option("-n", "--namespace", metavar="NS", help=namespace)(run) if namespace else run

    return decorate


def run_on_cluster(flags: ClusterFlags, work: Callable[[ApiClient], Awaitable[_T]]) -> _T:
    """Do it with a client of the chosen cluster. What the user must act on is raised as ClickException."""
    try:
        access = flags.find_access()
        where = f"{access.host}:{access.port}, by {access.origin}"
        return _run(access, work)
    except NoKubeconfigError as exc:
        running = _running_labs()
        beside = f"; a lab is running ({', '.join(running)}), but this is for clusters: see 'meshctl lab --help'" if running else ""
        raise click.ClickException(f"{exc}{beside}") from exc
    except KubeconfigError as exc:
        raise click.ClickException(str(exc)) from exc
    except ApiError as exc:
        hint = _HINTS.get(exc.status)
        raise click.ClickException(f"{exc.message}\n{where}" + (f": {hint}" if hint else "")) from exc
    except ApiUnavailable as exc:
        raise click.ClickException(f"{exc}\n{where}: is the cluster running, and is it the one that was meant?") from exc
    except ClusterProblem as exc:
        raise click.ClickException(str(exc)) from exc


def _run(access: ClusterAccess, work: Callable[[ApiClient], Awaitable[_T]]) -> _T:
    client = ApiClient(access)

    async def main() -> _T:
        try:
            return await work(client)
        finally:
            with trio.CancelScope(shield=True):
                await client.aclose()

    try:
        return trio.run(main)
    except BaseExceptionGroup as group:
        raise _first_of(group) from group


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Nurseries wrap what ended them; of several the first says enough."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def choose_place(flags: ClusterFlags, lab_name: str | None) -> Lab | None:
    """The lab that is meant, or None for a cluster. Raises ClickException where both could be."""
    if lab_name is not None and flags.chosen:
        raise click.UsageError("a lab and a cluster are named: which of them is meant?")
    if flags.chosen:
        return None
    running = _running_labs()
    files = kubeconfig_files(os.environ, Path.home())
    if lab_name is None and running and files:
        names = " or ".join(f"--lab {name}" for name in running)
        raise click.UsageError(
            f"a lab is running ({', '.join(running)}) and there is a kubeconfig ({files[0]}): say which is meant, {names} or --context NAME"
        )
    if lab_name is None and not running:
        _require_cluster(flags)
        return None
    try:
        return Lab(choose_lab(lab_name, "--lab"))
    except LabError as exc:
        raise click.ClickException(str(exc)) from exc


def _require_cluster(flags: ClusterFlags) -> None:
    """Raises ClickException where there is nothing to act on: who meant a lab must not read of kubeconfigs alone."""
    try:
        flags.find_access()
    except NoKubeconfigError as exc:
        raise click.ClickException(f"no lab is running ('meshctl lab up DIR' starts one), and {exc}") from exc
    except KubeconfigError:
        return  # told where the cluster is used


def _running_labs() -> list[str]:
    return [home.name for home in find_labs() if home.alive]


def find_follower(directory: Path) -> Lab | None:
    """The running lab that lives from this directory."""
    for home in find_labs():
        with suppress(LabError):
            if home.alive and Path(Lab(home).status().source) == directory.resolve():
                return Lab(home)
    return None
