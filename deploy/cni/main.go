// ambient-mesh-cni is the mesh's CNI plugin, chained behind the one that gives pods their addresses: it holds a pod of the mesh back until
// the node's agent has captured it. It changes nothing itself and prints the result of the plugin before it as it came.
//
// Who decides: the agent, over its Unix socket. Where the agent does not answer, the API server is asked whether the pod belongs to the
// mesh: if it does not it passes, if it does, or if nobody knows, the plugin fails with the reason, which the kubelet shows as the pod's
// event before it tries again. The agent's own pods and excluded namespaces pass before anybody is asked, and other pods of the agent's
// namespace where nobody can answer: else agents, which need the control plane, and the control plane could wait for each other.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// Codes of the CNI specification's "Error" section.
const (
	codeVersion     = 1
	codeEnvironment = 4
	codeIO          = 5
	codeDecoding    = 6
	codeConfig      = 7
	codeTryAgain    = 11
	maxInput        = 1 << 20
	wholeAdd        = 60 * time.Second // the kubelet gives a sandbox four minutes
	defaultVersion  = "1.0.0"
)

var supportedVersions = []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// A failure is what the specification wants on standard output when a command fails.
type failure struct {
	CNIVersion string `json:"cniVersion"`
	Code       int    `json:"code"`
	Message    string `json:"msg"`
}

func (f *failure) Error() string { return f.Message }

func fail(code int, format string, arguments ...any) *failure {
	return &failure{Code: code, Message: fmt.Sprintf(format, arguments...)}
}

func main() {
	config, err := run(os.Getenv, os.Stdin, os.Stdout)
	if err == nil {
		return
	}
	shown := &failure{}
	if !errors.As(err, &shown) {
		shown = fail(codeIO, "%s", err)
	}
	shown.CNIVersion = config.version()
	encoded, _ := json.Marshal(shown)
	os.Stdout.Write(append(encoded, '\n'))
	os.Exit(1)
}

// run carries out one command; the configuration it returns is what could be read of it.
func run(environment func(string) string, in io.Reader, out io.Writer) (*netConf, error) {
	command := environment("CNI_COMMAND")
	config, err := readConfig(in)
	switch command {
	case "VERSION":
		// Answered whatever the configuration says: this is how a runtime finds out which one it may write.
		return config, json.NewEncoder(out).Encode(map[string]any{"cniVersion": config.version(), "supportedVersions": supportedVersions})
	case "ADD":
		if err != nil {
			return config, err
		}
		ctx, cancel := context.WithTimeout(context.Background(), wholeAdd)
		defer cancel()
		return config, add(ctx, config, environment, out)
	case "CHECK", "DEL", "GC", "STATUS":
		// Nothing was made in ADD, so nothing is to be looked at or removed. The agent sees pods end in the API. STATUS says that pods may
		// be added: whether one must wait depends on the pod.
		return config, nil
	}
	return config, fail(codeEnvironment, "CNI_COMMAND %q is not a command of CNI", command)
}

func add(ctx context.Context, config *netConf, environment func(string) string, out io.Writer) error {
	if len(config.PrevResult) == 0 {
		return fail(codeConfig, "prevResult is missing: %s must be chained behind the plugin that gives pods their addresses", config.Type)
	}
	pod, err := readPod(environment)
	if err != nil {
		return err
	}
	if reason := config.passes(pod); reason == "" {
		ips, err := readIPs(config.PrevResult)
		if err != nil {
			return err
		}
		request := addRequest{Netns: environment("CNI_NETNS"), PodName: pod.name, PodNamespace: pod.namespace, PodUID: pod.uid, IPs: ips}
		if err := hold(ctx, config, pod, request); err != nil {
			return fail(codeTryAgain, "ambient mesh: %s", err)
		}
	}
	_, err = out.Write(append(config.PrevResult, '\n'))
	return err
}

// hold returns when the pod may start, or why it must wait.
func hold(ctx context.Context, config *netConf, pod podName, request addRequest) error {
	answer := askAgent(ctx, config.Socket, request)
	if answer.decided() {
		return answer.verdict()
	}
	belongs, because, err := askAPI(ctx, config.Kubeconfig, pod, config.ExcludedNamespaces)
	if err != nil && pod.namespace == config.Agent.Namespace {
		return nil // the control plane among them: agents cannot start before it has
	}
	if err != nil {
		return fmt.Errorf("%w, and whether the pod belongs to the mesh is not known: %w", answer.err, err)
	}
	if !belongs {
		return nil
	}
	// A restarting agent is back soon: waiting for it is cheaper than another sandbox.
	for until := time.Now().Add(agentReturns); time.Now().Before(until) && ctx.Err() == nil && !answer.decided(); {
		select {
		case <-ctx.Done():
		case <-time.After(agentPause):
			answer = askAgent(ctx, config.Socket, request)
		}
	}
	if answer.decided() {
		return answer.verdict()
	}
	return fmt.Errorf("the pod waits because it belongs to the mesh (%s) and could not be captured: %w", because, answer.err)
}
