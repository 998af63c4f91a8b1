"""``istiod-py``: the control plane as a command."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import click
import trio

from istiod_py.app import StartFailed, run_istiod
from istiod_py.config import Config
from mesh.runtime.signals import watch_signals
from mesh.telemetry.log import InvalidLogSettings, configure_from, get_logger

EXIT_CONFIG = 78
"""Exit status (EX_CONFIG of sysexits.h) when it can't start as configured: a restart would not help."""

_log = get_logger("istiod")

_DIRECTORY = click.Path(path_type=Path, file_okay=False)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="ambient-mesh", prog_name="istiod-py")
@click.option("--source", type=_DIRECTORY, help="Directory of Kubernetes YAML; watched. Either this or --kubeconfig.")
@click.option("--kubeconfig", metavar="PATH|in-cluster", help="Read the API server of this kubeconfig, or of our own cluster.")
@click.option(
    "--overlay", "overlays", multiple=True, type=_DIRECTORY, help="Directory of status to merge onto the source's objects; repeat."
)
@click.option("--state-dir", required=True, type=_DIRECTORY, help="Where keys and certificates are kept; made if missing.")
@click.option("--listen", default=":15012", metavar="HOST:PORT", help="For agents: configuration and certificates, over TLS.")
@click.option("--monitoring", default=":15014", metavar="HOST:PORT", help="HTTP: /ready, /metrics, /debug/problems, status, config_dump.")
@click.option("--token-dir", type=_DIRECTORY, help="Where the token of each Node is written.  [default: STATE_DIR/tokens]")
@click.option("--cacerts", type=_DIRECTORY, help="Your own CA: ca-key.pem, ca-cert.pem, root-cert.pem, cert-chain.pem.")
@click.option("--trust-domain", default="cluster.local", help="First part of every identity.")
@click.option("--cluster-id", default="Kubernetes", help="Name of this cluster.")
@click.option("--root-namespace", default="istio-system", help="Policies here are for the whole mesh.")
@click.option("--deploy-dir", type=_DIRECTORY, help="With --source: where pods and services of waypoints are written.")
@click.option("--status-dir", type=_DIRECTORY, help="With --source: where the status of Gateways is written; below an --overlay.")
@click.option("--waypoint-image", metavar="IMAGE", help="With --kubeconfig: of waypoints.  [default: that of our own pod]")
@click.option(
    "--debounce-ms", default=100, type=click.IntRange(0, 10_000), help="Changes that come within so many milliseconds are one push."
)
@click.option(
    "--jwks-refresh",
    default=1200,
    type=click.IntRange(1, 7 * 24 * 3600),
    metavar="SECONDS",
    help="Until a key set of tokens (jwksUri) is fetched again.",
)
@click.option(
    "--trusted-node-account",
    "trusted",
    multiple=True,
    metavar="NAMESPACE/NAME",
    default=("istio-system/ztunnel",),
    help="Service account of node agents on Kubernetes; repeat.",
)
@click.option("--read-secrets", is_flag=True, help="On Kubernetes, read Secrets: DestinationRules may then name credentials.")
def main(
    source: Path | None,
    kubeconfig: str | None,
    overlays: tuple[Path, ...],
    state_dir: Path,
    listen: str,
    monitoring: str,
    token_dir: Path | None,
    cacerts: Path | None,
    trust_domain: str,
    cluster_id: str,
    root_namespace: str,
    deploy_dir: Path | None,
    status_dir: Path | None,
    waypoint_image: str | None,
    debounce_ms: int,
    jwks_refresh: int,
    trusted: tuple[str, ...],
    read_secrets: bool,
) -> None:
    """The control plane: reads Kubernetes objects, tells node agents what they need, and signs their certificates.

    Logging is set by the environment: LOG_FORMAT (plain, json) and RUST_LOG (info, or SCOPE=LEVEL,...).
    """
    if (source is None) == (not kubeconfig):
        raise click.UsageError("give either --source or --kubeconfig")
    if kubeconfig and (overlays or token_dir or deploy_dir or status_dir):
        raise click.UsageError("--overlay, --token-dir, --deploy-dir and --status-dir go with --source only")
    if (deploy_dir is None) != (status_dir is None):
        raise click.UsageError("--deploy-dir and --status-dir go together")
    config = Config(
        source=source,
        state_dir=state_dir,
        overlays=overlays,
        listen=listen,
        monitoring=monitoring,
        token_dir=token_dir,
        cacerts=cacerts,
        trust_domain=trust_domain,
        cluster_id=cluster_id,
        root_namespace=root_namespace,
        debounce=debounce_ms / 1000,
        jwks_refresh=float(jwks_refresh),
        kubeconfig=kubeconfig or "",
        trusted_node_accounts=frozenset(trusted),
        read_secrets=read_secrets,
        deploy_dir=deploy_dir,
        status_dir=status_dir,
        waypoint_image=waypoint_image or "",
        waypoint_environment={name: os.environ[name] for name in ("LOG_FORMAT", "RUST_LOG") if name in os.environ},
        replica=os.environ.get("POD_NAME") or socket.gethostname(),
    )
    try:
        configure_from()
        trio.run(_run, config)
    except (StartFailed, InvalidLogSettings) as exc:
        print(f"istiod-py: {exc}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)


async def _run(config: Config) -> None:
    failure: StartFailed | None = None
    async with trio.open_nursery() as nursery:
        stop = await nursery.start(watch_signals)
        try:
            await nursery.start(run_istiod, config)
        except StartFailed as exc:
            failure = exc  # out of the nursery first, which would wrap it
        else:
            await stop.wait()
            _log.info("stopping")
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


if __name__ == "__main__":
    main()
