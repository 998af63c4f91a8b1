"""The agent's pages below ``/debug/``, for ``meshctl node`` and ``meshctl status``: small, bounded, each about one thing.

All take ``namespace``, ``pod`` (a name, or NAMESPACE/NAME) and ``limit`` where they make sense; what is beyond the limit is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, islice
from typing import Final, TypeAlias, TypeVar

import msgspec
from cryptography import x509

from mesh.model.workload import Workload
from mesh.runtime import inspection
from mesh.runtime.http import Handler, Request, Response, Route, Routes
from mesh.runtime.readiness import Readiness
from mesh.state.store import MeshState
from mesh.tls.peer import spiffe_ids_of
from mesh.tls.rotation import CertificateManager, CertificateState, Stage
from mesh.xds.client import AdsState, Phase
from ztunnel_py.brain.dump import Json, dump_policy, dump_service, dump_workload
from ztunnel_py.brain.movers import Movers
from ztunnel_py.brain.pods import CannotServe, PodKeeper
from ztunnel_py.config import AgentConfig
from ztunnel_py.pods.facts import PodFacts
from ztunnel_py.pods.lifecycle import Phase as PodPhase
from ztunnel_py.pods.lifecycle import PodStatus
from ztunnel_py.redirect.apply import CaptureFailed, CaptureReading

_T = TypeVar("_T")
_TROUBLE: Final = (PodPhase.PENDING, PodPhase.WAITING, PodPhase.CAPTURING, PodPhase.RELEASING)


class BadQuery(Exception):
    """The request can't be answered; the text is for the person who asked. ``status`` is HTTP's."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of the agent's things was asked for; empty: all."""

    namespace: str = ""
    pod: str = ""
    limit: int = inspection.DEFAULT_LIMIT

    @classmethod
    def parse(cls, request: Request) -> Wanted:
        """Raises BadQuery."""
        known = {"namespace", "pod", "limit"}
        unknown = sorted(request.query.keys() - known)
        if unknown:
            raise BadQuery(f"unknown parameter {unknown[0]}: there are {', '.join(sorted(known))}")
        text = request.query.get("limit", str(inspection.DEFAULT_LIMIT))
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and 0 < int(text) <= inspection.MAX_LIMIT):
            raise BadQuery(f"limit={text}: expected 1 to {inspection.MAX_LIMIT}")
        namespace, slash, name = request.query.get("pod", "").rpartition("/")
        return cls(namespace if slash else request.query.get("namespace", ""), name, int(text))

    def names(self, namespace: str, name: str) -> bool:
        return self.namespace in ("", namespace) and self.pod in ("", name)


_PageFunction: TypeAlias = Callable[[Wanted], Awaitable[inspection.Page]]


class Pages:
    """Answers from what the brain holds; connections are asked of the movers, rules of the kernel."""

    def __init__(
        self,
        config: AgentConfig,
        state: MeshState,
        certificates: CertificateManager,
        movers: Movers,
        pods: PodKeeper,
        readiness: Readiness,
        ads_state: Callable[[], AdsState],
    ) -> None:
        self._config = config
        self._state = state
        self._certificates = certificates
        self._movers = movers
        self._pods = pods
        self._readiness = readiness
        self._ads_state = ads_state

    def routes(self) -> Routes:
        pages = {
            "status": self._status,
            "pods": self._pod_list,
            "connections": self._connections,
            "certificates": self._certificate_list,
            "policies": self._policies,
            "workloads": self._workloads,
            "services": self._services,
            "rules": self._rules,
        }
        return {f"/debug/{name}": Route(_answering(page)) for name, page in pages.items()}

    async def _status(self, wanted: Wanted) -> inspection.StatusPage:
        config, ads = self._config, self._ads_state()
        statuses = self._pods.statuses()
        certificates = self._certificates.states()
        bundles = [state.bundle for state in certificates if state.bundle is not None]
        troubled = (_pod_page(self._pods, pod, status) for pod, status in statuses.values() if status.phase in _TROUBLE)
        problem = next((f"{state.identity}: {state.because}" for state in certificates if state.because), "")
        return inspection.StatusPage(
            node=config.node_name,
            version=version("ambient-mesh"),
            pod=config.pod_name,
            pod_namespace=config.pod_namespace,
            ready=not self._readiness.pending,
            pending=[inspection.PendingTask(name, self._readiness.detail(name)) for name in self._readiness.pending],
            movers=len(self._movers.living()),
            control_plane=f"{config.xds_address.host}:{config.xds_address.port}",
            connected=ads.phase is Phase.CONNECTED,
            synced=ads.synced,
            configuration=str(ads),
            workloads=sum(1 for _ in self._state.workloads()),
            services=sum(1 for _ in self._state.services()),
            policies=sum(1 for _ in self._state.policies()),
            pods=dict(Counter(status.phase.value for _, status in statuses.values())),
            troubled=sorted(troubled, key=lambda pod: (pod.namespace, pod.name))[: inspection.MAX_TROUBLED],
            certificates=len(certificates),
            unavailable=sum(1 for state in certificates if state.stage is not Stage.AVAILABLE),
            next_expiry=min((bundle.not_after.timestamp() for bundle in bundles), default=None),
            certificate_problem=problem,
        )

    async def _pod_list(self, wanted: Wanted) -> inspection.PodsPage:
        living = Counter((told.pod, told.direction) for told in (await self._living())[0])
        pods = (
            msgspec.structs.replace(
                _pod_page(self._pods, pod, status), inbound=living[pod.uid, "inbound"], outbound=living[pod.uid, "outbound"]
            )
            for pod, status in self._of_pods(wanted)
        )
        return inspection.PodsPage(*_bounded(pods, wanted.limit))

    async def _connections(self, wanted: Wanted) -> inspection.ConnectionsPage:
        told, unheard = await self._living()
        pods = {pod.uid: pod for pod, _ in self._of_pods(wanted)}
        found = (
            inspection.NamedConnection(pods[living.pod].namespace, pods[living.pod].name, living) for living in told if living.pod in pods
        )
        items, omitted = _bounded(found, wanted.limit)
        return inspection.ConnectionsPage(items, omitted + unheard)

    async def _living(self) -> tuple[list[inspection.LivingConnection], int]:
        """The connections of all movers, and how many they left out."""
        answers = [scraped for _, scraped in await self._movers.scrape(inspection.MAX_LIMIT)]
        return [*chain.from_iterable(scraped.connections for scraped in answers)], sum(scraped.omitted for scraped in answers)

    async def _certificate_list(self, wanted: Wanted) -> inspection.CertificatesPage:
        chosen = (state for state in self._certificates.states() if wanted.namespace in ("", state.identity.namespace))
        if wanted.pod:
            identities = {self._pods.identity_of(pod) for pod, _ in self._of_pods(wanted)}
            chosen = (state for state in chosen if state.identity in identities)
        return inspection.CertificatesPage(*_bounded(map(_certificate_page, chosen), wanted.limit))

    async def _policies(self, wanted: Wanted) -> inspection.ObjectsPage:
        policies = sorted(self._state.policies(), key=lambda policy: policy.key)
        if wanted.pod:
            workloads = list(self._workloads_of(wanted))
            if not workloads:  # of a misspelt name no policies would read as if nothing guarded the pod
                raise BadQuery(f"it knows no pod {wanted.pod}{_where(wanted)}", 404)
            applied = {id(policy) for workload in workloads for policy in self._state.policies_for(workload).policies}
            policies = [policy for policy in policies if id(policy) in applied]
        elif wanted.namespace:
            policies = [policy for policy in policies if policy.namespace == wanted.namespace]
        return inspection.ObjectsPage(*_bounded(map(dump_policy, policies), wanted.limit))

    async def _workloads(self, wanted: Wanted) -> inspection.ObjectsPage:
        workloads = sorted(self._workloads_of(wanted), key=lambda workload: workload.uid)
        return inspection.ObjectsPage(*_bounded(map(dump_workload, workloads), wanted.limit))

    async def _services(self, wanted: Wanted) -> inspection.ObjectsPage:
        services = sorted(self._state.services(), key=lambda service: (service.hostname, service.namespace))
        dumped: Iterable[Json] = (dump_service(service, self._state) for service in services if wanted.namespace in ("", service.namespace))
        return inspection.ObjectsPage(*_bounded(dumped, wanted.limit))

    async def _rules(self, wanted: Wanted) -> inspection.AllRulesPage:
        items: list[inspection.RulesPage] = []
        omitted = 0
        for pod, status in self._of_pods(wanted):
            if len(items) == wanted.limit:
                omitted += 1
                continue
            page = inspection.RulesPage(pod.uid, pod.namespace, pod.name, status.phase.value)
            try:
                items.append(_with_rules(page, await self._pods.read_rules(pod.uid)))
            except (CannotServe, CaptureFailed) as exc:
                items.append(msgspec.structs.replace(page, error=status.because if isinstance(exc, CannotServe) else str(exc)))
        return inspection.AllRulesPage(items, omitted)

    def _of_pods(self, wanted: Wanted) -> list[tuple[PodFacts, PodStatus]]:
        """This node's pods that were asked for, in order. Raises BadQuery when one was named that is not there."""
        found = [(pod, status) for pod, status in self._pods.statuses().values() if wanted.names(pod.namespace, pod.name)]
        if wanted.pod and not found:
            raise BadQuery(f"it has nothing to do with a pod {wanted.pod}{_where(wanted)}", 404)
        return sorted(found, key=lambda entry: (entry[0].namespace, entry[0].name))

    def _workloads_of(self, wanted: Wanted) -> Iterator[Workload]:
        return (workload for workload in self._state.workloads() if wanted.names(workload.namespace, workload.name))


def _where(wanted: Wanted) -> str:
    return f" in namespace {wanted.namespace}" if wanted.namespace else ""


def _answering(page: _PageFunction) -> Handler:
    async def answer(request: Request) -> Response:
        try:
            told = await page(Wanted.parse(request))
        except BadQuery as exc:
            return Response.text(str(exc), exc.status)
        return Response(200, msgspec.json.encode(told), "application/json")

    return answer


def _bounded(items: Iterable[_T], limit: int) -> tuple[list[_T], int]:
    """The first ones, and how many there are beyond."""
    rest = iter(items)
    return list(islice(rest, limit)), sum(1 for _ in rest)


def _pod_page(keeper: PodKeeper, pod: PodFacts, status: PodStatus) -> inspection.PodPage:
    return inspection.PodPage(
        uid=pod.uid,
        namespace=pod.namespace,
        name=pod.name,
        identity=str(keeper.identity_of(pod)),
        phase=status.phase.value,
        because=status.because,
        addresses=list(map(str, pod.ips)),
        netns=pod.netns_path,
    )


def _certificate_page(state: CertificateState) -> inspection.CertificatePage:
    bundle = state.bundle
    parts: list[inspection.CertificatePart] = []
    if bundle is not None:
        leaf, *above = x509.load_pem_x509_certificates(b"".join(bundle.chain_pem))
        roots = x509.load_pem_x509_certificates(bundle.roots_pem)
        parts = [
            _certificate_part("Leaf", leaf),
            *(_certificate_part("Intermediate", certificate) for certificate in above if certificate not in roots),
            *(_certificate_part("Root", certificate) for certificate in roots),
        ]
    return inspection.CertificatePage(
        identity=str(state.identity),
        state=state.stage.value,
        because=state.because or "",
        renewal=state.renewal.timestamp() if state.renewal is not None else None,
        chain=parts,
    )


def _certificate_part(kind: str, certificate: x509.Certificate) -> inspection.CertificatePart:
    return inspection.CertificatePart(
        type=kind,
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        serial=f"{certificate.serial_number:x}",
        not_before=certificate.not_valid_before_utc.timestamp(),
        not_after=certificate.not_valid_after_utc.timestamp(),
        uris=list(map(str, spiffe_ids_of(certificate))),
    )


def _with_rules(page: inspection.RulesPage, reading: CaptureReading) -> inspection.RulesPage:
    chains = [
        inspection.ChainPage(
            table.name,
            chain.name,
            [inspection.RulePage(rule.text, rule.expected, rule.packets, rule.bytes) for rule in chain.rules],
        )
        for table in reading.tables
        for chain in table.chains
    ]
    return msgspec.structs.replace(page, differences=list(reading.differences), chains=chains, foreign_tables=list(reading.foreign))
