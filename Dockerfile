# Caddy with `transport oauth2`, built from a checkout of this repository:
#
#	docker build -t caddy-outbound-auth .
#	docker run --read-only --cap-drop ALL -p 8080:8080 \
#		-v "$PWD/Caddyfile:/etc/caddy/Caddyfile:ro" caddy-outbound-auth
#
# Any builder that knows cache mounts will do: Docker since 23.0, Podman, Buildah. For the
# same program byte for byte each time, name the patch release of Go as well.
ARG GO_VERSION=1.26

FROM golang:${GO_VERSION} AS build
WORKDIR /src
COPY . .

# Not with xcaddy: go.mod and go.sum name Caddy and all that is below it exactly as the
# tests have it. For more plugins, import them in cmd/caddy/main.go.
#
# Flags and tags are those of Caddy's own releases. Without cgo the program needs no C
# library, and so no base image. The caches only save time.
RUN --mount=type=cache,target=/go/pkg/mod \
	--mount=type=cache,target=/root/.cache/go-build \
	CGO_ENABLED=0 go build -trimpath -ldflags '-w -s' \
		-tags nobadger,nomysql,nopgx -o /out/caddy ./cmd/caddy

RUN mkdir /out/empty

FROM scratch

# To check the certificates of authorization servers and upstreams.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /out/caddy /usr/bin/

# A number, so that Kubernetes can see that it isn't root. What Caddy keeps is in two
# volumes, which it can write to even with --read-only: certificates and their keys in
# data, the last config in config.
USER 65532:65532
ENV XDG_DATA_HOME=/data XDG_CONFIG_HOME=/config
COPY --from=build --chown=65532:65532 /out/empty/ /data/
COPY --from=build --chown=65532:65532 /out/empty/ /config/
VOLUME /data /config

# The program has no file capability for ports below 1024: with one, it could not even
# start where all capabilities are dropped. Publish such a port from a higher one
# (-p 443:8443), or let everybody bind it, as Docker does by default and elsewhere
# --sysctl net.ipv4.ip_unprivileged_port_start=80 does.
EXPOSE 8080 8443 8443/udp

# No HEALTHCHECK: there is nothing in here to ask with. Let the platform ask for a path
# that needs no token, as in examples/kubernetes.
ENTRYPOINT ["/usr/bin/caddy"]
CMD ["run", "--config", "/etc/caddy/Caddyfile"]
