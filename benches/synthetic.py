"""A mesh of any size, made of arithmetic: the same for the same size. Ten workloads a service, a policy for every hundredth workload."""

from __future__ import annotations

from ipaddress import IPv4Address

from msgspec.structs import replace

from mesh.model.address import NamespacedHostname, NetworkAddress, SocketAddress
from mesh.model.policy import Action, Clause, Exact, Match, Policy, Rule, Scope
from mesh.model.service import Service, ServicePort
from mesh.model.workload import PortMapping, TunnelProtocol, Workload
from mesh.state.store import Delta

PER_SERVICE = 10
WORKLOADS_PER_POLICY = 100
_NAMESPACES = 100
_NODES = 500
_POD_NETWORK = int(IPv4Address("10.0.0.0"))
_VIRTUAL = int(IPv4Address("172.20.0.0"))


def mesh(workloads: int) -> Delta:
    """So many workloads, a tenth of that services, a hundredth of that policies."""
    return Delta(
        workloads=tuple(workload(number) for number in range(workloads)),
        services=tuple(_service(number) for number in range(workloads // PER_SERVICE)),
        policies=tuple(_policy(number) for number in range(workloads // WORKLOADS_PER_POLICY)),
    )


def workload(number: int) -> Workload:
    """The endpoint ``number``."""
    service = number // PER_SERVICE
    namespace = _namespace(service)
    policy = number // WORKLOADS_PER_POLICY
    named = (f"{_namespace(policy * WORKLOADS_PER_POLICY // PER_SERVICE)}/allow-{policy}",) if number % WORKLOADS_PER_POLICY == 0 else ()
    name = f"app-{service}-{number % PER_SERVICE}"
    return Workload(
        uid=f"Kubernetes//Pod/{namespace}/{name}",
        name=name,
        namespace=namespace,
        addresses=(IPv4Address(_POD_NETWORK + 256 + number),),
        tunnel_protocol=TunnelProtocol.HBONE,
        service_account=f"app-{service}",
        node=f"node-{number % _NODES}",
        canonical_name=f"app-{service}",
        canonical_revision="v1",
        workload_name=f"app-{service}",
        authorization_policies=named,
        services={NamespacedHostname(namespace, _hostname(service)): (PortMapping(80, 8080),)},
    )


def moved(number: int, turn: int) -> Workload:
    """The same endpoint, changed as a new pod of its name would be."""
    return replace(workload(number), node=f"node-{(number + turn) % _NODES}", canonical_revision=f"v{turn}")


def virtual_address(service: int) -> SocketAddress:
    """Where clients of a service connect."""
    return SocketAddress(IPv4Address(_VIRTUAL + 256 + service), 80)


def _service(number: int) -> Service:
    return Service(
        name=f"app-{number}",
        namespace=_namespace(number),
        hostname=_hostname(number),
        addresses=(NetworkAddress("", virtual_address(number).ip),),
        ports=(ServicePort(80, 8080),),
    )


def _policy(number: int) -> Policy:
    namespace = _namespace(number * WORKLOADS_PER_POLICY // PER_SERVICE)
    callers = tuple(Exact(f"cluster.local/ns/{namespace}/sa/app-{caller}") for caller in range(number, number + 5))
    rule = Rule((Clause((Match(principals=callers),)), Clause((Match(destination_ports=(8080,)),))))
    return Policy(f"allow-{number}", namespace, Scope.WORKLOAD_SELECTOR, Action.ALLOW, (rule,))


def _namespace(service: int) -> str:
    return f"team-{service % _NAMESPACES}"


def _hostname(service: int) -> str:
    return f"app-{service}.{_namespace(service)}.svc.cluster.local"
