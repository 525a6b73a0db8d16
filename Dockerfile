# Three images: `controller` and `holder` have nothing but their program; `node` also has the distribution's mkfs, fsck, mount and blkid.
#   docker build --target controller -t lockstep/controller:0.1.0 .
#   docker build --target node -t lockstep/node:0.1.0 .
#   docker build --target holder -t lockstep/holder:0.1.0 .
FROM rust:1-trixie AS builder
WORKDIR /src
COPY . .
# cargo tells by the time of a file whether it has changed since the build before, which another clone may have made: what differs from that one's is copied
# anew, with the time of now, and nothing else.
# Static: two of the images have no libraries. Where a target is named, its flags are not those of macros and build scripts, which cannot be static.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,id=lockstep-by-content,target=/target,sharing=locked \
    mkdir -p /target/src \
    && (cd /target/src && find . -type f ! -exec test -f '/src/{}' ';' -delete && find . -mindepth 1 -type d -empty -delete) \
    && find . -type f ! -exec cmp -s '{}' '/target/src/{}' ';' -print0 | xargs -0r cp --parents -t /target/src \
    && cd /target/src \
    && export CARGO_TARGET_DIR=/target host=$(rustc -vV | sed -n 's/^host: //p') \
    && RUSTFLAGS="-C target-feature=+crt-static" cargo build --release --locked --target "$host" \
        -p lockstep-csi-controller -p lockstep-csi-node -p lockstep-fuse-holder \
    && install -D -t /out "/target/$host/release/csi-controller" "/target/$host/release/csi-node" "/target/$host/release/fuse-holder"

FROM scratch AS controller
COPY --from=builder /out/csi-controller /
USER 65532:65532
ENTRYPOINT ["/csi-controller"]

FROM scratch AS holder
COPY --from=builder /out/fuse-holder /
ENTRYPOINT ["/fuse-holder"]

FROM debian:trixie-slim AS node
RUN apt-get update \
    && apt-get install -y --no-install-recommends e2fsprogs mount util-linux xfsprogs \
    && rm -rf /var/lib/apt/lists/*
COPY --from=builder /out/csi-node /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/csi-node"]
