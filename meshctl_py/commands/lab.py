"""``meshctl lab``: the user's cluster on one machine."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Concatenate, NoReturn, ParamSpec, TypeVar

import click
import msgspec

from meshctl_py import render
from meshctl_py.lab.client import Lab, StartingLab, UpOptions, start_lab
from meshctl_py.lab.home import LabError, LabHome, choose_lab, find_labs, name_from_directory, remove_remains
from meshctl_py.lab.messages import Failed, Ready, Waiting
from meshctl_py.lab.status import LabStatus
from meshctl_py.logs import show_log

_P = ParamSpec("_P")
_T = TypeVar("_T")

_INTERRUPTED = 130
"""Exit status by which shells know Ctrl-C."""


@click.group()
def lab() -> None:
    """Run a cluster with its mesh on this machine: nodes and pods are network namespaces, programs are real."""


def _refusing(command: Callable[_P, _T]) -> Callable[_P, _T]:
    """What the user must act on is a line of text, not a traceback."""

    @wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return command(*args, **kwargs)
        except LabError as exc:
            raise click.ClickException(str(exc)) from exc

    return run


def _in_lab(command: Callable[Concatenate[Lab, _P], _T]) -> Callable[_P, _T]:
    """Gives a command its lab: that of --name, or the only one that runs."""

    @click.option("--name", "--lab", "name", metavar="LAB", help="Which lab; needed when several are running.")
    @_refusing
    @wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        name = kwargs.pop("name")
        assert name is None or isinstance(name, str)
        return command(Lab(choose_lab(name)), *args, **kwargs)

    return run


@lab.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--name", metavar="LAB", help="The lab's name; by default the directory's.")
@click.option("--timeout", type=click.FloatRange(min=1), default=60.0, show_default=True, help="Seconds until everything must be ready.")
@click.option("--keep", is_flag=True, help="Leave the lab running when not everything becomes ready in time.")
@click.option("--movers", type=click.IntRange(1, 64), help="Data plane processes of each agent; by default one per CPU, at most 4.")
@click.option("--istiod-arg", "istiod", metavar="ARG", multiple=True, help="More of the control plane's command line; repeat.")
@click.option("--copy", is_flag=True, help="Follow a copy of DIR, which goes with the lab; 'lab status' shows where it is.")
@click.option("--foreground", is_flag=True, help="Stay until Ctrl-C, which ends the lab.")
@_refusing
def up(
    directory: Path,
    name: str | None,
    timeout: float,
    keep: bool,
    movers: int | None,
    istiod: tuple[str, ...],
    copy: bool,
    foreground: bool,
) -> None:
    """Build the cluster that the YAML files in DIR describe, and wait until it is ready.

    Changes to the files are followed while the lab runs. Ctrl-C before it is ready removes everything.
    """
    began = time.monotonic()
    signal.signal(signal.SIGTERM, _interrupt)
    options = UpOptions(patience=timeout, keep=keep, movers=movers, istiod=istiod, copy=copy, tied=foreground)
    with start_lab(directory, name or name_from_directory(directory), options) as starting, render.progress() as progress:
        try:
            for event in starting:
                match event:
                    case Waiting(step, pending):
                        progress.show(step, pending)
                    case Ready(status):
                        progress.finish(ready=True)
                        alone = sum(home.alive for home in find_labs()) == 1
                        render.show_up(status, time.monotonic() - began, alone=alone, foreground=foreground)
                        if foreground:
                            starting.wait_gone()
                    case Failed():
                        progress.finish()
                        _fail(starting, event, keep)
        except KeyboardInterrupt:
            progress.finish()
            click.echo("interrupted: removing everything", err=True)
            sys.exit(_INTERRUPTED)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(starting: StartingLab, failure: Failed, keep: bool) -> NoReturn:
    render.show_failure(failure)
    if keep and failure.status is not None:
        starting.leave_running()
        name = starting.home.name
        click.echo(f"the lab is still running: 'meshctl lab status --name {name}', 'meshctl lab down --name {name}'", err=True)
    sys.exit(1)


@lab.command()
@click.option("--all", "every", is_flag=True, help="End all labs.")
@click.option("--name", "--lab", "name", metavar="LAB", help="Which lab; needed when several are running.")
@_refusing
def down(every: bool, name: str | None) -> None:
    """End a lab and remove everything of it."""
    remains = [home for home in find_labs() if not home.alive and (every or name in (None, home.name))]
    for home in remains:
        remove_remains(home)
        click.echo(f"lab {home.name}: files of a killed lab removed")
    running = [home for home in find_labs() if home.alive]
    if not every and not (remains and (name is not None or not running)):
        running = [choose_lab(name)]
    for home in running if every or not remains or name is None else []:
        Lab(home).down()
        click.echo(f"lab {home.name} is gone")


@lab.command("list")
@_refusing
def list_labs() -> None:
    """Show the labs of this user."""
    render.show_labs([(home, _state_of(home)) for home in find_labs()])


def _state_of(home: LabHome) -> LabStatus | str:
    if not home.alive:
        return "killed"
    try:
        return Lab(home).status()
    except LabError:
        return "starting"  # it has its lock, and no ear yet


@lab.command()
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", help="As tables, or as JSON.")
@_in_lab
def status(running: Lab, output: str) -> None:
    """Show nodes, pods, services, processes, and what is wrong with the source."""
    found = running.status()
    if output == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2))
    else:
        render.show_status(found)


class _RunsCommand(click.Command):
    """Takes a command line as its last arguments, which people write without the '--' before it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as exc:
            hint = "An option of COMMAND's own? Then '--' goes before COMMAND: meshctl lab exec TARGET -- COMMAND ..."
            raise click.UsageError(f"{exc.format_message()}\n{hint}", ctx) from exc


@lab.command("exec", cls=_RunsCommand)
@click.option("-i", "-t", is_flag=True, expose_value=False, help="Accepted for kubectl's sake: COMMAND has your terminal anyway.")
@click.option("-n", "--namespace", metavar="NS", help="The pod's namespace; needed when pods of several have this name.")
@click.option("-c", "--container", metavar="CONTAINER", help="Whose working directory; by default the first container's.")
@_in_lab
@click.argument("target")
@click.argument("command", nargs=-1, required=True)
def execute(running: Lab, namespace: str | None, container: str | None, target: str, command: tuple[str, ...]) -> None:
    """Run COMMAND in a pod, a node, or the router between the nodes.

    TARGET is a pod's or node's name, NAMESPACE/POD, 'router' or 'istiod'. As with kubectl, COMMAND follows after '--' when it has options
    of its own.
    """
    running.open_command(target, command, namespace=namespace, container=container).execute()


@lab.command()
@click.argument("process")
@click.option("-f", "--follow", is_flag=True, help="Go on as the log grows.")
@click.option("-n", "--namespace", metavar="NS", help="The pod's namespace.")
@click.option("-c", "--container", metavar="CONTAINER", help="The container; needed for pods with several.")
@click.option("--tail", "lines", type=click.IntRange(min=0), help="Only so many last lines.")
@_in_lab
def logs(running: Lab, process: str, follow: bool, namespace: str | None, container: str | None, lines: int | None) -> None:
    """Show the log of a process: 'istiod', 'ztunnel-NODE', 'keeper', or a pod's name."""
    path = _find_log(running.home, process, namespace, container)
    show_log(path, lines, follow=lambda: follow and running.home.alive)


def _find_log(home: LabHome, process: str, namespace: str | None, container: str | None) -> Path:
    pod_namespace, _, pod = process.partition("/") if "/" in process else (namespace, "", process)
    pattern = f"{pod_namespace or '*'}_{pod.replace('/', '_')}_{container or '*'}.log"
    found = [path for path in (home.logs / f"{process}.log", home.logs / f"ztunnel-{process}.log") if "/" not in process and path.exists()]
    found = found[:1] or sorted(home.logs.glob(pattern)) or sorted(home.logs.glob(f"{process.replace('/', '_')}.log"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(path.stem.replace("_", "/") for path in found or sorted(home.logs.glob("*.log")))
    if found:
        raise LabError(f"{process} has several logs, choose with -n and -c: {names}")
    where = "".join(f" {kind} {name}" for kind, name in (("namespace", namespace), ("container", container)) if name is not None)
    raise LabError(f"there is no log of {process}{where and f' in{where}'} (there are: {names})")


@lab.command()
@click.argument("process")
@_in_lab
def restart(running: Lab, process: str) -> None:
    """End a process with SIGTERM; the lab starts it again."""
    click.echo(running.restart(process))


def _signal_number(context: click.Context, parameter: click.Parameter, value: str) -> int:
    try:
        return signal.Signals(int(value)) if value.isdecimal() else signal.Signals[f"SIG{value.upper().removeprefix('SIG')}"]
    except (KeyError, ValueError):
        raise click.BadParameter(f"{value} is no signal") from None


@lab.command()
@click.argument("process")
@click.option("-s", "--signal", "number", default="KILL", show_default=True, callback=_signal_number, help="A signal's name or number.")
@_in_lab
def kill(running: Lab, process: str, number: int) -> None:
    """Send a signal to a process: 'istiod', 'ztunnel-NODE', 'NAMESPACE/POD/CONTAINER', or 'NAMESPACE/POD' that has one container.

    'ztunnel-NODE/brain' and 'ztunnel-NODE/mover' are parts of an agent.
    """
    whole, _, part = process.rpartition("/")
    if whole and process.startswith("ztunnel-"):
        click.echo(running.signal(whole, number, part))
    else:
        click.echo(running.signal(process, number))
