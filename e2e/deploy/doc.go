// Package deploy tests what users deploy the gateway with: the Dockerfile, and
// the examples for systemd and Kubernetes. It is a module of its own because it
// needs the API types of Kubernetes.
package deploy
