import json

from istiod_py.dump import describe
from mesh.model.address import GatewayAddress, NamespacedHostname, parse_cidr, parse_ip
from mesh.model.policy import Action, Clause, Match, Policy, Presence, Rule, Scope
from mesh.model.workload import PortMapping, TunnelProtocol, Workload


def test_a_workload_is_readable_and_has_no_defaults():
    workload = Workload(
        "c//Pod/app/a", "a", "app", addresses=(parse_ip("10.0.0.1"),), tunnel_protocol=TunnelProtocol.HBONE,
        waypoint=GatewayAddress(NamespacedHostname("app", "waypoint.app.svc.cluster.local")),
        services={NamespacedHostname("app", "a.app.svc.cluster.local"): (PortMapping(80, 8080),)},
    )  # fmt: skip
    assert describe(workload) == {
        "uid": "c//Pod/app/a",
        "name": "a",
        "namespace": "app",
        "addresses": ["10.0.0.1"],
        "tunnel_protocol": "HBONE",
        "waypoint": {"destination": "app/waypoint.app.svc.cluster.local"},
        "services": {"app/a.app.svc.cluster.local": [{"service_port": 80, "target_port": 8080}]},
    }


def test_a_policy_survives_json():
    match = Match(principals=(Presence(),), source_ips=(parse_cidr("10.0.0.0/8"),))
    policy = Policy("p", "app", Scope.NAMESPACE, Action.DENY, (Rule((Clause((match,)),)),))
    dumped = json.loads(json.dumps(describe(policy)))
    assert (dumped["scope"], dumped["action"]) == ("NAMESPACE", "DENY")
    assert dumped["rules"][0]["clauses"][0]["matches"][0]["source_ips"] == ["10.0.0.0/8"]
