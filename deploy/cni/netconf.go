package main

import (
	"encoding/json"
	"io"
	"net"
	"regexp"
	"slices"
	"strings"
)

// netConf is the plugin's own entry of the chain, as the runtime hands it over on standard input; the agent's installer writes it.
type netConf struct {
	CNIVersion         string          `json:"cniVersion"`
	Type               string          `json:"type"`
	Socket             string          `json:"socket"`
	Kubeconfig         string          `json:"kubeconfig"`
	ExcludedNamespaces []string        `json:"excludedNamespaces"`
	Agent              agentConf       `json:"agent"`
	PrevResult         json.RawMessage `json:"prevResult"`
}

// agentConf names the agent's own pods, which must start without an agent.
type agentConf struct {
	Namespace string `json:"namespace"`
	DaemonSet string `json:"daemonSet"`
}

type podName struct {
	namespace, name, uid string
}

func readConfig(in io.Reader) (*netConf, error) {
	config := &netConf{}
	data, err := io.ReadAll(io.LimitReader(in, maxInput+1))
	if err != nil {
		return config, fail(codeIO, "the configuration cannot be read: %s", err)
	}
	if len(data) > maxInput {
		return config, fail(codeDecoding, "the configuration is larger than %d bytes", maxInput)
	}
	if err := json.Unmarshal(data, config); err != nil {
		return config, fail(codeDecoding, "the configuration is not what this plugin expects: %s", err)
	}
	if !slices.Contains(supportedVersions, config.CNIVersion) {
		return config, fail(codeVersion, "cniVersion %q is not one of %s", config.CNIVersion, strings.Join(supportedVersions, ", "))
	}
	for field, value := range map[string]string{"socket": config.Socket, "kubeconfig": config.Kubeconfig} {
		if !strings.HasPrefix(value, "/") {
			return config, fail(codeConfig, "%s: expected an absolute path, found %q", field, value)
		}
	}
	return config, nil
}

// version is what to answer in, also where the configuration could not be read.
func (config *netConf) version() string {
	if slices.Contains(supportedVersions, config.CNIVersion) {
		return config.CNIVersion
	}
	return defaultVersion
}

var daemonSetSuffix = regexp.MustCompile(`^-[a-z0-9]{5}$`)

// passes says why a pod is none of our business whatever its labels say; "" where somebody must be asked.
func (config *netConf) passes(pod podName) string {
	switch {
	case pod.name == "":
		return "not a pod of Kubernetes"
	case slices.Contains(config.ExcludedNamespaces, pod.namespace):
		return "namespace " + pod.namespace + " is excluded"
	case config.Agent.DaemonSet != "" && pod.namespace == config.Agent.Namespace &&
		strings.HasPrefix(pod.name, config.Agent.DaemonSet) && daemonSetSuffix.MatchString(pod.name[len(config.Agent.DaemonSet):]):
		return "an agent's own pod"
	}
	return ""
}

var plain = regexp.MustCompile(`^[A-Za-z0-9.-]{1,253}$`)

// readPod reads CNI_ARGS, KEY=VALUE pairs separated by semicolons. Without a pod's name in it the runtime is not Kubernetes'.
func readPod(environment func(string) string) (podName, error) {
	values := map[string]string{}
	for _, pair := range strings.Split(environment("CNI_ARGS"), ";") {
		key, value, _ := strings.Cut(pair, "=")
		values[key] = value
	}
	pod := podName{values["K8S_POD_NAMESPACE"], values["K8S_POD_NAME"], values["K8S_POD_UID"]}
	if pod.namespace == "" || pod.name == "" {
		return podName{}, nil
	}
	for _, value := range []string{pod.namespace, pod.name} { // they become parts of paths
		if !plain.MatchString(value) {
			return podName{}, fail(codeEnvironment, "CNI_ARGS: %q cannot be a name in Kubernetes", value)
		}
	}
	return pod, nil
}

// podIP is an address in the shape that Istio's plugin sends it.
type podIP struct {
	Interface *int      `json:"Interface"`
	Address   net.IPNet `json:"Address"`
	Gateway   net.IP    `json:"Gateway"`
}

// readIPs reads the addresses in a result of CNI 0.3.0 or later.
func readIPs(result json.RawMessage) ([]podIP, error) {
	var parsed struct {
		IPs []struct {
			Address   string `json:"address"`
			Gateway   string `json:"gateway"`
			Interface *int   `json:"interface"`
		} `json:"ips"`
	}
	if err := json.Unmarshal(result, &parsed); err != nil {
		return nil, fail(codeDecoding, "prevResult is not a result of CNI: %s", err)
	}
	ips := make([]podIP, 0, len(parsed.IPs))
	for _, entry := range parsed.IPs {
		address, network, err := net.ParseCIDR(entry.Address)
		if err != nil {
			return nil, fail(codeDecoding, "prevResult: ips: %s", err)
		}
		ips = append(ips, podIP{entry.Interface, net.IPNet{IP: address, Mask: network.Mask}, net.ParseIP(entry.Gateway)})
	}
	return ips, nil
}
