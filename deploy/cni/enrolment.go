package main

import "slices"

const (
	dataplaneMode = "istio.io/dataplane-mode"
	sidecarStatus = "sidecar.istio.io/status"
)

// facts is what the decision depends on. The agent decides by the same table; testdata/enrolment.json holds the two against each other.
type facts struct {
	Namespace       string            `json:"namespace"`
	NamespaceLabels map[string]string `json:"namespace_labels"`
	PodLabels       map[string]string `json:"pod_labels"`
	PodAnnotations  map[string]string `json:"pod_annotations"`
	HostNetwork     bool              `json:"host_network"`
	Phase           string            `json:"phase"`
	Excluded        []string          `json:"excluded_namespaces"`
}

// enrolled reports whether a pod belongs to the mesh, and the label that says so.
func enrolled(of facts) (bool, string) {
	_, sidecar := of.PodAnnotations[sidecarStatus]
	ended := of.Phase == "Succeeded" || of.Phase == "Failed"
	if of.HostNetwork || sidecar || ended || slices.Contains(of.Excluded, of.Namespace) {
		return false, ""
	}
	switch of.PodLabels[dataplaneMode] {
	case "ambient":
		return true, "pod label " + dataplaneMode + "=ambient"
	case "none":
		return false, ""
	}
	if of.NamespaceLabels[dataplaneMode] == "ambient" {
		return true, "namespace label " + dataplaneMode + "=ambient"
	}
	return false, ""
}
