package main

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

const prevResult = `{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}],"ips":[{"address":"10.1.2.3/24","gateway":"10.1.2.1","interface":0},` +
	`{"address":"fd00::3/64"}],"unknown to us":{"kept":  true}}`

// A world is a node with an agent and an API server, both played by the test.
type world struct {
	t          *testing.T
	config     map[string]any
	arguments  string
	command    string
	requests   []addRequest
	agent      func(addRequest) (int, string)
	apiObjects map[string]string
	apiCalls   atomic.Int32
	socket     string
}

func newWorld(t *testing.T) *world {
	directory := t.TempDir()
	w := &world{t: t, command: "ADD", socket: filepath.Join(directory, "cni.sock"), apiObjects: map[string]string{}}
	w.arguments = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-1;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=uid-1"
	api := httptest.NewTLSServer(http.HandlerFunc(w.serveAPI))
	t.Cleanup(api.Close)
	roots := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: api.Certificate().Raw})
	kubeconfig, _ := json.Marshal(map[string]any{
		"clusters": []any{map[string]any{"name": "c", "cluster": map[string]any{"server": api.URL, "certificate-authority-data": roots}}},
		"users":    []any{map[string]any{"name": "u", "user": map[string]any{"token": "secret"}}},
	})
	path := filepath.Join(directory, "kubeconfig")
	if err := os.WriteFile(path, kubeconfig, 0o600); err != nil {
		t.Fatal(err)
	}
	w.config = map[string]any{
		"cniVersion": "1.0.0", "name": "pods", "type": "ambient-mesh-cni", "socket": w.socket, "kubeconfig": path,
		"excludedNamespaces": []string{"kube-system"}, "agent": map[string]any{"namespace": "istio-system", "daemonSet": "ztunnel"},
		"prevResult": json.RawMessage(prevResult),
	}
	return w
}

func (w *world) serveAPI(response http.ResponseWriter, request *http.Request) {
	w.apiCalls.Add(1)
	if request.Header.Get("Authorization") != "Bearer secret" {
		response.WriteHeader(http.StatusUnauthorized)
		return
	}
	found, ok := w.apiObjects[request.URL.Path]
	if !ok {
		response.WriteHeader(http.StatusNotFound)
		return
	}
	io.WriteString(response, found)
}

func (w *world) labelled(mode string) {
	w.apiObjects["/api/v1/namespaces/shop"] = fmt.Sprintf(`{"metadata":{"labels":{"istio.io/dataplane-mode":%q}}}`, mode)
	w.apiObjects["/api/v1/namespaces/shop/pods/web-1"] = `{"metadata":{"uid":"uid-1"},"status":{"phase":"Pending"}}`
}

func (w *world) startAgent(answer func(addRequest) (int, string)) {
	listener, err := net.Listen("unix", w.socket)
	if err != nil {
		w.t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(response http.ResponseWriter, request *http.Request) {
		var got addRequest
		if err := json.NewDecoder(request.Body).Decode(&got); err != nil || request.URL.Path != "/cmdadd" || request.Method != http.MethodPost {
			w.t.Errorf("%s %s: %v", request.Method, request.URL.Path, err)
		}
		w.requests = append(w.requests, got)
		status, text := answer(got)
		response.WriteHeader(status)
		io.WriteString(response, text)
	})}
	go server.Serve(listener)
	w.t.Cleanup(func() { server.Close() })
}

func (w *world) run() (string, error) {
	environment := map[string]string{"CNI_COMMAND": w.command, "CNI_NETNS": "/var/run/netns/cni-1", "CNI_ARGS": w.arguments}
	encoded, _ := json.Marshal(w.config)
	out := &bytes.Buffer{}
	_, err := run(func(name string) string { return environment[name] }, bytes.NewReader(encoded), out)
	return strings.TrimSpace(out.String()), err
}

func (w *world) passes() {
	w.t.Helper()
	out, err := w.run()
	if err != nil || !same(out, prevResult) {
		w.t.Errorf("did not pass: %v: %s", err, out)
	}
}

// same: json.Marshal of the test's configuration strips blanks between the tokens.
func same(a, b string) bool {
	compact := &bytes.Buffer{}
	json.Compact(compact, []byte(b))
	return a == compact.String()
}

func (w *world) waits(reasons ...string) {
	w.t.Helper()
	out, err := w.run()
	if err == nil || out != "" {
		w.t.Fatalf("did not fail: %q", out)
	}
	for _, reason := range reasons {
		if !strings.Contains(err.Error(), reason) {
			w.t.Errorf("%q does not say %q", err, reason)
		}
	}
}

func TestAPodPassesUnchangedOnceTheAgentSaysSo(t *testing.T) {
	w := newWorld(t)
	w.startAgent(func(addRequest) (int, string) { return 200, "" })
	w.passes()
	encoded, _ := json.Marshal(w.requests[0])
	want := `{"Netns":"/var/run/netns/cni-1","PodName":"web-1","PodNamespace":"shop","PodUID":"uid-1","IPs":[` +
		`{"Interface":0,"Address":{"IP":"10.1.2.3","Mask":"////AA=="},"Gateway":"10.1.2.1"},` +
		`{"Interface":null,"Address":{"IP":"fd00::3","Mask":"//////////8AAAAAAAAAAA=="},"Gateway":""}]}`
	if string(encoded) != want {
		t.Errorf("asked %s", encoded)
	}
	if w.apiCalls.Load() != 0 {
		t.Error("the API server was asked although the agent answered")
	}
}

func TestAPodTheAgentCouldNotCaptureWaitsWithTheAgentsReason(t *testing.T) {
	w := newWorld(t)
	w.labelled("none")
	w.startAgent(func(addRequest) (int, string) { return 500, "cannot write the rules: no space\n" })
	w.waits("the node's agent says: cannot write the rules: no space")
}

func TestWithoutAnAgentAPodOutsideTheMeshPasses(t *testing.T) {
	w := newWorld(t)
	w.labelled("none")
	w.passes()
}

func TestWithoutAnAgentAPodOfTheMeshWaitsAndSaysWhy(t *testing.T) {
	w := newWorld(t)
	w.labelled("ambient")
	w.waits("namespace label istio.io/dataplane-mode=ambient", "the node's agent does not answer", w.socket)
}

func TestAnAgentThatCannotSayYetIsAskedAgainForPodsOfTheMeshOnly(t *testing.T) {
	w := newWorld(t)
	asked := 0
	w.startAgent(func(addRequest) (int, string) {
		asked++
		if asked < 4 {
			return 503, "waiting for the first configuration"
		}
		return 200, ""
	})
	w.labelled("ambient")
	w.passes()
	if asked != 4 {
		t.Errorf("asked %d times", asked)
	}
	asked = 0
	w.labelled("none")
	w.passes()
	if asked != 1 {
		t.Errorf("asked %d times for a pod outside the mesh", asked)
	}
}

func TestAPodNobodyKnowsWaits(t *testing.T) {
	w := newWorld(t)
	w.waits("does not answer", "is not known", "404")
	w.labelled("none")
	w.apiObjects["/api/v1/namespaces/shop/pods/web-1"] = `{"metadata":{"uid":"uid-2"}}`
	w.waits("another pod of this name")
	w.config["kubeconfig"] = "/nonexistent/kubeconfig"
	w.waits("/nonexistent/kubeconfig")
}

func TestAgentsAndExcludedNamespacesPassBeforeAnybodyIsAsked(t *testing.T) {
	w := newWorld(t)
	w.config["kubeconfig"] = "/nonexistent/kubeconfig"
	for _, arguments := range []string{
		"K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=coredns-1",
		"K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=ztunnel-ab2cd",
		"",
	} {
		w.arguments = arguments
		w.passes()
	}
	for _, arguments := range []string{
		"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=ztunnel-ab2cd",
		"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=istiod-1",
	} {
		w.arguments = arguments
		w.waits("is not known")
	}
}

func TestTheControlPlaneDoesNotWaitForAgentsThatWaitForIt(t *testing.T) {
	w := newWorld(t)
	w.arguments = "K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=istiod-1"
	w.config["kubeconfig"] = "/nonexistent/kubeconfig"
	w.passes()
}

func TestATokenThatIsNotAcceptedAnyMoreIsSaidSo(t *testing.T) {
	w := newWorld(t)
	path := w.config["kubeconfig"].(string)
	data, _ := os.ReadFile(path)
	os.WriteFile(path, bytes.ReplaceAll(data, []byte("secret"), []byte("stale")), 0o600)
	w.waits("does not accept the plugin's token", "/etc/cni/net.d")
}

func TestCommandsThatChangeNothingSucceedWithoutAnybody(t *testing.T) {
	w := newWorld(t)
	for _, command := range []string{"CHECK", "DEL", "GC", "STATUS"} {
		w.command = command
		if out, err := w.run(); err != nil || out != "" {
			t.Errorf("%s: %v: %s", command, err, out)
		}
	}
	w.command = "VERSION"
	out, err := w.run()
	if err != nil || !strings.Contains(out, `"supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]`) {
		t.Errorf("VERSION: %v: %s", err, out)
	}
}

func TestWhatTheRuntimeGotWrongIsNamed(t *testing.T) {
	cases := map[string]func(*world){
		`cniVersion "0.1.0"`:          func(w *world) { w.config["cniVersion"] = "0.1.0" },
		"socket: expected":            func(w *world) { w.config["socket"] = "cni.sock" },
		"prevResult is missing":       func(w *world) { delete(w.config, "prevResult") },
		"prevResult: ips":             func(w *world) { w.config["prevResult"] = json.RawMessage(`{"ips":[{"address":"x"}]}`) },
		"not a result of CNI":         func(w *world) { w.config["prevResult"] = json.RawMessage(`[]`) },
		"cannot be a name":            func(w *world) { w.arguments = "K8S_POD_NAMESPACE=../..;K8S_POD_NAME=a" },
		`"EAT" is not a command`:      func(w *world) { w.command = "EAT" },
		"not what this plugin expect": func(w *world) { w.config["socket"] = 5 },
		"larger than":                 func(w *world) { w.config["name"] = strings.Repeat("x", maxInput) },
	}
	for reason, spoil := range cases {
		w := newWorld(t)
		spoil(w)
		w.waits(reason)
	}
}

func TestTheTableOfEnrolmentHolds(t *testing.T) {
	data, err := os.ReadFile("testdata/enrolment.json")
	if err != nil {
		t.Fatal(err)
	}
	var rows []struct {
		facts
		Enrolled bool `json:"enrolled"`
	}
	if err := json.Unmarshal(data, &rows); err != nil || len(rows) < 10 {
		t.Fatal(err, len(rows))
	}
	for _, row := range rows {
		if got, because := enrolled(row.facts); got != row.Enrolled || got != (because != "") {
			t.Errorf("%+v: %v because %q", row, got, because)
		}
	}
}
