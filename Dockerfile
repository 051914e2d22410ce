# The image: one static binary, no shell, no libraries. `cargo xtask image` makes the same one without Docker, from the last
# stage below.
#     docker build --build-arg VERSION=0.1.0 --build-arg REVISION="$(git rev-parse HEAD)" -t audit-log-sweeper:0.1.0 .
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
# glibc since 2.34 looks names up without loading a library, so a static binary can do it too.
ARG REVISION
RUN AUDIT_LOG_SWEEPER_REVISION="${REVISION}" \
    RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=/usr/local/cargo=/cargo" \
    cargo build --locked --release --bin audit-log-sweeper --target "$(uname -m)-unknown-linux-gnu" && \
    cp target/*-unknown-linux-gnu/release/audit-log-sweeper /audit-log-sweeper

FROM scratch
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="audit-log-sweeper"
LABEL org.opencontainers.image.description="A Kubernetes operator that completes the audit log rows which a crash left open"
LABEL org.opencontainers.image.licenses="Apache-2.0"
LABEL org.opencontainers.image.version="${VERSION}"
LABEL org.opencontainers.image.revision="${REVISION}"
COPY --from=build /audit-log-sweeper /audit-log-sweeper
# A number, so that runAsNonRoot can be checked.
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["/audit-log-sweeper"]
CMD ["run"]
