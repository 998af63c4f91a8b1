package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

const (
	agentDials   = 2 * time.Second
	agentAnswers = 30 * time.Second // longer than the agent takes to say that it could not
	agentReturns = 5 * time.Second
	agentPause   = 250 * time.Millisecond
	maxReason    = 1 << 10
)

// addRequest is the body of POST /cmdadd: Istio's own, and the pod's uid.
type addRequest struct {
	Netns        string  `json:"Netns"`
	PodName      string  `json:"PodName"`
	PodNamespace string  `json:"PodNamespace"`
	PodUID       string  `json:"PodUID,omitempty"`
	IPs          []podIP `json:"IPs"`
}

// agentAnswer: status is HTTP's, 0 where there was no answer; err says why the pod must not start.
type agentAnswer struct {
	status int
	err    error
}

// decided is false where the agent is away, or there and not able to say: then the API server is asked.
func (answer agentAnswer) decided() bool {
	return answer.status != 0 && answer.status != http.StatusServiceUnavailable
}

func (answer agentAnswer) verdict() error { return answer.err }

func askAgent(ctx context.Context, socket string, request addRequest) agentAnswer {
	ctx, cancel := context.WithTimeout(ctx, agentAnswers)
	defer cancel()
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: agentDials}).DialContext(ctx, "unix", socket)
	}
	body, err := json.Marshal(request)
	if err != nil {
		return agentAnswer{err: err}
	}
	post, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent/cmdadd", bytes.NewReader(body))
	if err != nil {
		return agentAnswer{err: err}
	}
	post.Header.Set("Content-Type", "application/json")
	client := http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, CheckRedirect: noRedirect}
	response, err := client.Do(post)
	if err != nil {
		return agentAnswer{err: fmt.Errorf("the node's agent does not answer at %s: %w", socket, innermost(err))}
	}
	defer response.Body.Close()
	if response.StatusCode == http.StatusOK {
		return agentAnswer{status: response.StatusCode}
	}
	reason, _ := io.ReadAll(io.LimitReader(response.Body, maxReason))
	return agentAnswer{response.StatusCode, fmt.Errorf("the node's agent says: %s", strings.TrimSpace(string(reason)))}
}

func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// innermost drops what the HTTP client says around the cause, an invented URL first of all.
func innermost(err error) error {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err
		}
		err = inner
	}
}
