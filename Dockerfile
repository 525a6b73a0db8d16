# Two images: `controller` needs nothing but its binary; `node` also needs the distribution's mkfs, fsck, mount and blkid.
#   docker build --target controller -t lockstep-controller .
#   docker build --target node -t lockstep-node .
FROM rust:1-trixie AS builder
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/target \
    CARGO_TARGET_DIR=/target cargo build --release --locked -p lockstep-csi-controller -p lockstep-csi-node \
    && install -D -t /out /target/release/csi-controller /target/release/csi-node

FROM debian:trixie-slim AS controller
COPY --from=builder /out/csi-controller /usr/local/bin/
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/csi-controller"]

FROM debian:trixie-slim AS node
RUN apt-get update \
    && apt-get install -y --no-install-recommends e2fsprogs mount util-linux xfsprogs \
    && rm -rf /var/lib/apt/lists/*
COPY --from=builder /out/csi-node /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/csi-node"]
