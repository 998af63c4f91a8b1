"""The mesh on a Kubernetes cluster, as `meshctl` sees it from outside: its objects, its agents, its installation."""
