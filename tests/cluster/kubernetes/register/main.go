// What the kubelet does with a socket in its directory of plugins, in its own words: operationexecutor's dial, GetInfo and
// NotifyRegistrationStatus. Prints what the plugin says.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

func dial(ctx context.Context, unixSocketPath string, timeout time.Duration) (registerapi.RegistrationClient, *grpc.ClientConn, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	c, err := grpc.DialContext(ctx, unixSocketPath,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithBlock(),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", addr)
		}),
	)
	if err != nil {
		return nil, nil, fmt.Errorf("failed to dial socket %s, err: %v", unixSocketPath, err)
	}
	return registerapi.NewRegistrationClient(c), c, nil
}

func register(socket string) error {
	client, conn, err := dial(context.Background(), socket, 10*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	info, err := client.GetInfo(ctx, &registerapi.InfoRequest{})
	if err != nil {
		return fmt.Errorf("GetInfo: %v", err)
	}
	for _, status := range []*registerapi.RegistrationStatus{{PluginRegistered: false, Error: "not yet"}, {PluginRegistered: true}} {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if _, err := client.NotifyRegistrationStatus(ctx, status); err != nil {
			return fmt.Errorf("NotifyRegistrationStatus: %v", err)
		}
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{
		"type": info.Type, "name": info.Name, "endpoint": info.Endpoint, "versions": info.SupportedVersions,
	})
}

func main() {
	if err := register(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
