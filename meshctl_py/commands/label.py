"""``meshctl label``: set and remove labels, with kubectl's words, on a cluster or in the YAML that a lab lives from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.directory import DirectoryStore, LabelError, edit_labels
from mesh.kube.kinds import KINDS
from mesh.kube.label_edit import check_label
from mesh.kube.resources import DAEMON_SETS, RESOURCES
from mesh.model.labels import DATAPLANE_MODE
from meshctl_py.cluster.errors import ClusterProblem
from meshctl_py.cluster.objects import AGENT, SYSTEM_NAMESPACE, Controller, Meta, Named, find_one, list_all
from meshctl_py.lab.home import LabError
from meshctl_py.target import ClusterFlags, choose_place, cluster_flags, run_on_cluster

_NAMES = {
    "Namespace": ("namespace", "namespaces", "ns"),
    "Pod": ("pod", "pods", "po"),
    "Service": ("service", "services", "svc"),
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names}
_MODES = ("ambient", "none")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What to label and how. Without ``names`` those of ``selector``, or all (``everything``)."""

    kind: str
    names: tuple[str, ...]
    labels: Mapping[str, str | None]
    overwrite: bool
    everything: bool = False
    selector: str = ""


@click.command()
@click.argument("kind", metavar="(namespace|pod|service)")
@click.argument("words", nargs=-1, required=True, metavar="NAME... LABEL...")
@click.option("--overwrite", is_flag=True, help="Change labels that have another value.")
@click.option("--all", "everything", is_flag=True, help="Label all; of pods and services, those of the namespace.")
@click.option("-l", "--selector", default="", metavar="SELECTOR", help="Label those that have these labels, as kubectl writes it.")
@click.option(
    "-f",
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Edit the YAML of this directory, whether or not a lab runs.",
)
@click.option("--lab", "--name", "lab_name", metavar="LAB", help="Edit the YAML of this lab's directory.")
@cluster_flags(namespace="The pods' or services' namespace; by default the context's, or 'default' in a directory.")
def label(
    flags: ClusterFlags,
    kind: str,
    words: tuple[str, ...],
    overwrite: bool,
    everything: bool,
    selector: str,
    directory: Path | None,
    lab_name: str | None,
) -> None:
    """Set labels (KEY=VALUE) of namespaces, pods or services, or remove them (KEY-).

    'meshctl label namespace shop istio.io/dataplane-mode=ambient' enrols a namespace in the mesh. Without --directory and --lab it is
    the cluster's namespace, or that of the lab that runs; in a lab the YAML is edited, and keeps its comments and form.
    """
    wanted = _parse(kind, words, overwrite=overwrite, everything=everything, selector=selector)
    lab = choose_place(flags, lab_name) if directory is None else None
    if directory is None and lab is None:
        for line in run_on_cluster(flags, lambda client: label_on_cluster(client, wanted, flags.namespace or client.access.namespace)):
            click.echo(line)
        return
    if everything or selector:
        raise click.UsageError("--all and --selector go with a cluster; of a directory's objects give the names")
    try:
        source = directory if directory is not None or lab is None else Path(lab.status().source)
        assert source is not None
        namespace = (flags.namespace or "default") if KINDS[wanted.kind].namespaced else ""
        for name in wanted.names:
            for line in apply_labels(source, wanted.kind, namespace, name, wanted.labels, overwrite=overwrite):
                click.echo(line)
        for line in _warn_of_mode(wanted.labels):
            click.echo(line)
    except (LabError, LabelError) as exc:
        raise click.ClickException(str(exc)) from exc
    except OSError as exc:
        raise click.ClickException(f"cannot write {exc.filename}: {exc.strerror}") from exc


def _parse(kind: str, words: Sequence[str], *, overwrite: bool, everything: bool, selector: str) -> _Wanted:
    """kubectl's arguments: a kind and names, or KIND/NAME, then labels."""
    short, slash, name = kind.partition("/")
    if short not in _KINDS:
        raise click.UsageError(f"'{short}' can't be labelled: 'namespace', 'pod' or 'service'")
    count = next((index for index, word in enumerate(words) if _is_label(word)), len(words))
    names = (*([name] if slash else []), *words[:count])
    labels = words[count:]
    if not labels:
        raise click.UsageError(f"{words[-1]!r} is neither KEY=VALUE nor KEY-")
    if bool(names) + everything + bool(selector) != 1:
        raise click.UsageError("give either names, --all or --selector")
    return _Wanted(_KINDS[short], names, _parse_labels(labels), overwrite, everything, selector)


def _is_label(word: str) -> bool:
    return "=" in word or (word.endswith("-") and len(word) > 1)


async def label_on_cluster(client: ApiClient, wanted: _Wanted, namespace: str) -> list[str]:
    """Label, and say what was done in kubectl's words. Raises ClusterProblem, ApiError, ApiUnavailable; what came before is done then."""
    try:
        for key, value in wanted.labels.items():
            check_label(key, value)
    except LabelError as exc:
        raise ClusterProblem(str(exc)) from exc
    resource = RESOURCES[wanted.kind]
    namespace = namespace if resource.namespaced else ""
    names = wanted.names
    if not names:
        found = await list_all(client, resource, Named, namespace=namespace, labels=wanted.selector)
        names = tuple(sorted(item.metadata.name for item in found))
    said: list[str] = []
    for name in names:
        path = resource.path(namespace, name)
        before = await find_one(client, resource, Named, namespace, name)
        if before is None:
            raise ClusterProblem(await _not_found(client, wanted.kind, namespace, name))
        said += _refuse_or_tell(before.metadata, wanted)
        change = {key: value for key, value in wanted.labels.items() if before.metadata.labels.get(key) != value}
        if change:
            await client.merge_patch(path, {"metadata": {"labels": change}})
        said.append(f"{wanted.kind.lower()}/{name} {_verdict(wanted.labels, changed=bool(change))}")
    if not names:
        said.append("no resources found" + (f" in {namespace} namespace" if namespace else ""))
    return [*said, *await _warnings(client, wanted.labels)]


def _refuse_or_tell(before: Meta, wanted: _Wanted) -> list[str]:
    missing: list[str] = []
    for key, value in wanted.labels.items():
        present = before.labels.get(key)
        if value is None and present is None:
            missing.append(f'label "{key}" not found.')
        elif value is not None and present not in (None, value) and not wanted.overwrite:
            what = f"{wanted.kind.lower()}/{before.name}"
            raise ClusterProblem(f"{what}: '{key}' already has a value ({present}), and --overwrite is false")
    return missing


def _verdict(labels: Mapping[str, str | None], *, changed: bool) -> str:
    if not changed:
        return "not labeled"
    return "unlabeled" if all(value is None for value in labels.values()) else "labeled"


async def _not_found(client: ApiClient, kind: str, namespace: str, name: str) -> str:
    where = f" in namespace {namespace}" if namespace else ""
    if namespace:
        elsewhere = await list_all(client, RESOURCES[kind], Named, fields=f"metadata.name={name}")
        if elsewhere:
            places = ", ".join(item.metadata.namespace for item in elsewhere)
            return f"there is no {kind.lower()} {name}{where}; there is one in namespace {places} (-n)"
    return f"there is no {kind.lower()} {name}{where}"


async def _warnings(client: ApiClient, labels: Mapping[str, str | None]) -> list[str]:
    """What keeps an enrolment from having an effect."""
    mode, meaningless = labels.get(DATAPLANE_MODE), _warn_of_mode(labels)
    if mode is None or meaningless:
        return meaningless
    try:
        agents = await find_one(client, DAEMON_SETS, Controller, SYSTEM_NAMESPACE, AGENT)
    except (ApiError, ApiUnavailable):
        return []  # who may label need not be allowed to look there
    if agents is None and mode == "ambient":
        return ["warning: the mesh is not installed in this cluster, so nothing is captured: 'meshctl install'"]
    return []


def _warn_of_mode(labels: Mapping[str, str | None]) -> list[str]:
    mode = labels.get(DATAPLANE_MODE)
    if mode is None or mode in _MODES:
        return []
    return [f"warning: {DATAPLANE_MODE}={mode} is neither ambient nor none, so it means nothing"]


def apply_labels(
    source: Path, kind: str, namespace: str, name: str, wanted: Mapping[str, str | None], *, overwrite: bool
) -> tuple[str, ...]:
    """Edit the object's labels and say what was done, in kubectl's words. Raises LabelError, OSError; nothing is written then."""
    present = labels_of(source, kind, namespace, name)
    for key, value in wanted.items():
        if value is not None and present.get(key, value) != value and not overwrite:
            raise LabelError(f"'{key}' already has a value ({present[key]}), and --overwrite is false")
    missing = tuple(f'label "{key}" not found.' for key, value in wanted.items() if value is None and key not in present)
    changed = edit_labels(source, kind, name, wanted, namespace=namespace) is not None
    return (*missing, f"{kind.lower()}/{name} {_verdict(wanted, changed=changed)}")


def labels_of(source: Path, kind: str, namespace: str, name: str) -> Mapping[str, str]:
    """The labels as the files have them; an object that can't be found is left to `edit_labels`, which says it best."""
    store = DirectoryStore([source])
    store.load()
    found = store.find(kind, namespace, name)
    if found is None:
        elsewhere = sorted(obj.namespace for obj in store.objects(kind) if obj.name == name)
        if elsewhere:
            raise LabelError(f"there is no {kind} {namespace}/{name} in {source}; there is one in namespace {', '.join(elsewhere)} (-n)")
        return {}
    return found.labels


def _parse_labels(texts: Sequence[str]) -> dict[str, str | None]:
    wanted: dict[str, str | None] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not _is_label(text):
            raise click.UsageError(f"{text!r} is neither KEY=VALUE nor KEY-")
        name = key if equals else text[:-1]
        if name in wanted:
            raise click.UsageError(f"label {name!r} is given twice")
        wanted[name] = value if equals else None
    return wanted
