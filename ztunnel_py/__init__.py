"""The node agent: captures the traffic of enrolled pods and carries it over mutual TLS (HBONE).

Three kinds of process (docs/design/ARCHITECTURE.md): the *supervisor* stays alive and restarts the brain; the *brain* (trio) owns
pods, certificates, configuration and admin; *movers* (reactor) own connections and outlive the brain.
"""
