"""``meshctl label``: set and remove labels in the YAML that a lab lives from, with kubectl's words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from mesh.kube.directory import DirectoryStore, LabelError, edit_labels
from meshctl_py.lab.client import Lab
from meshctl_py.lab.home import LabError, choose_lab

_KINDS = {
    name: kind for kind, names in {"Namespace": ("namespace", "namespaces", "ns"), "Pod": ("pod", "pods", "po")}.items() for name in names
}


@click.command()
@click.argument("kind", type=click.Choice(sorted(_KINDS)), metavar="(namespace|pod)")
@click.argument("object_name", metavar="NAME")
@click.argument("labels", nargs=-1, required=True, metavar="KEY=VALUE|KEY- ...")
@click.option("-n", "--namespace", default="default", show_default=True, metavar="NS", help="The pod's namespace.")
@click.option("--overwrite", is_flag=True, help="Change labels that have another value.")
@click.option(
    "-f",
    "--directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Edit this directory, whether or not a lab runs.",
)
@click.option("--name", "lab_name", metavar="LAB", help="Edit this lab's directory; needed when several are running.")
def label(
    kind: str, object_name: str, labels: tuple[str, ...], namespace: str, overwrite: bool, directory: Path | None, lab_name: str | None
) -> None:
    """Set (KEY=VALUE) or remove (KEY-) labels of a namespace or a pod in the lab's source.

    The YAML keeps its comments and form. 'meshctl label namespace shop istio.io/dataplane-mode=ambient' enrols a namespace in the mesh.
    """
    wanted = _parse_labels(labels)
    kind_name = _KINDS[kind]
    namespace = namespace if kind_name == "Pod" else ""
    try:
        source = directory or Path(Lab(choose_lab(lab_name)).status().source)
        outcome = apply_labels(source, kind_name, namespace, object_name, wanted, overwrite=overwrite)
    except (LabError, LabelError) as exc:
        raise click.ClickException(str(exc)) from exc
    except OSError as exc:
        raise click.ClickException(f"cannot write {exc.filename}: {exc.strerror}") from exc
    for line in outcome:
        click.echo(line)


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
    only_removed = all(value is None for value in wanted.values())
    verdict = ("unlabeled" if only_removed else "labeled") if changed else "not labeled"
    return (*missing, f"{kind.lower()}/{name} {verdict}")


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


def _parse_labels(texts: tuple[str, ...]) -> dict[str, str | None]:
    wanted: dict[str, str | None] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals and not (text.endswith("-") and len(text) > 1):
            raise click.UsageError(f"{text!r} is neither KEY=VALUE nor KEY-")
        name = key if equals else text[:-1]
        if name in wanted:
            raise click.UsageError(f"label {name!r} is given twice")
        wanted[name] = value if equals else None
    return wanted
