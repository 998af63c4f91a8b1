package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"
)

const (
	apiAnswers    = 10 * time.Second
	maxKubeconfig = 1 << 20
	maxObject     = 4 << 20
)

// kubeconfig is as much of one as the agent writes: JSON, one cluster, one user with a token.
type kubeconfig struct {
	Clusters []struct {
		Cluster struct {
			Server string `json:"server"`
			CA     []byte `json:"certificate-authority-data"`
		} `json:"cluster"`
	} `json:"clusters"`
	Users []struct {
		User struct {
			Token string `json:"token"`
		} `json:"user"`
	} `json:"users"`
}

type object struct {
	Metadata struct {
		UID         string            `json:"uid"`
		Labels      map[string]string `json:"labels"`
		Annotations map[string]string `json:"annotations"`
	} `json:"metadata"`
	Spec struct {
		HostNetwork bool `json:"hostNetwork"`
	} `json:"spec"`
	Status struct {
		Phase string `json:"phase"`
	} `json:"status"`
}

// askAPI reports whether the pod belongs to the mesh, and why.
func askAPI(ctx context.Context, path string, pod podName, excluded []string) (bool, string, error) {
	ctx, cancel := context.WithTimeout(ctx, apiAnswers)
	defer cancel()
	access, err := readKubeconfig(path)
	if err != nil {
		return false, "", err
	}
	var found, namespace object
	if err := access.get(ctx, "/api/v1/namespaces/"+pod.namespace+"/pods/"+pod.name, &found); err != nil {
		return false, "", err
	}
	if pod.uid != "" && found.Metadata.UID != pod.uid {
		return false, "", fmt.Errorf("the API server has another pod of this name by now")
	}
	if err := access.get(ctx, "/api/v1/namespaces/"+pod.namespace, &namespace); err != nil {
		return false, "", err
	}
	belongs, because := enrolled(facts{
		Namespace:       pod.namespace,
		NamespaceLabels: namespace.Metadata.Labels,
		PodLabels:       found.Metadata.Labels,
		PodAnnotations:  found.Metadata.Annotations,
		HostNetwork:     found.Spec.HostNetwork,
		Phase:           found.Status.Phase,
		Excluded:        excluded,
	})
	return belongs, because, nil
}

type apiAccess struct {
	client *http.Client
	server string
	token  string
}

func readKubeconfig(path string) (*apiAccess, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxKubeconfig))
	if err != nil {
		return nil, err
	}
	var config kubeconfig
	if err := json.Unmarshal(data, &config); err != nil {
		return nil, fmt.Errorf("%s is not the kubeconfig that the agent writes: %w", path, err)
	}
	if len(config.Clusters) != 1 || len(config.Users) != 1 {
		return nil, fmt.Errorf("%s is not the kubeconfig that the agent writes: one cluster and one user are expected", path)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(config.Clusters[0].Cluster.CA) {
		return nil, fmt.Errorf("%s: certificate-authority-data has no certificate in it", path)
	}
	transport := &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		DisableKeepAlives: false, // two requests of one command
	}
	client := &http.Client{Transport: transport, CheckRedirect: noRedirect}
	return &apiAccess{client, config.Clusters[0].Cluster.Server, config.Users[0].User.Token}, nil
}

func (access *apiAccess) get(ctx context.Context, path string, into *object) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, access.server+path, nil)
	if err != nil {
		return fmt.Errorf("the API server cannot be asked: %w", err)
	}
	request.Header.Set("Authorization", "Bearer "+access.token)
	request.Header.Set("Accept", "application/json")
	response, err := access.client.Do(request)
	if err != nil {
		return fmt.Errorf("the API server does not answer: %w", innermost(err))
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxObject))
	if err != nil {
		return fmt.Errorf("the API server does not answer: %w", innermost(err))
	}
	if response.StatusCode == http.StatusUnauthorized {
		return fmt.Errorf("the API server does not accept the plugin's token (if the mesh was uninstalled: take ambient-mesh-cni out of /etc/cni/net.d)")
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("the API server refuses %s: %s", path, response.Status)
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("the API server's answer is no object: %w", err)
	}
	return nil
}
