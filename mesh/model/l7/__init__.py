"""What a waypoint is told: the L7 configuration, translated by the control plane so that both sides read one vocabulary.

The control plane (`istiod_py.translate`) makes these values of Kubernetes and Istio resources: names expanded, order decided, defaults
filled in where Istio has one. A waypoint compiles them and never looks at a resource. They travel as JSON (`mesh.xds.l7`), since
only our own programs read them, and people do. A field that the reader does not know makes the whole unreadable: it may restrict. So what
is added later must be left out of the JSON where it has its default.

`matching` (what a request must look like), `routing` (what happens to it), `destination` (how endpoints are chosen and reached),
`policy` (who may, and what a token must prove), `waypoint` (the resources as they are pushed).
"""
