#!/usr/bin/env bash
# Build the images pho-api and pho-worker with docker, podman or buildah, whichever is there:
#   make images
#   make images WORKER_OPTIONS="--build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu"
# BUILDER names one of the three, IMAGES some of the images, OPTIONS are for all of them.
set -euo pipefail
cd "$(dirname "$0")/.."

works() {
    case $1 in
        docker) command -v docker >/dev/null && docker info >/dev/null 2>&1 ;; # needs its daemon
        *) command -v "$1" >/dev/null ;;
    esac
}

if [ -z "${BUILDER:-}" ]; then
    for BUILDER in docker podman buildah ""; do
        [ -z "$BUILDER" ] || ! works "$BUILDER" || break
    done
elif ! works "$BUILDER"; then
    echo "BUILDER=$BUILDER is not installed, or does not run." >&2
    exit 1
fi
if [ -z "$BUILDER" ]; then
    echo "There is no docker that runs, no podman and no buildah: install one of them." >&2
    exit 1
fi

read -ra options <<<"${OPTIONS:-}"
read -ra worker_options <<<"${WORKER_OPTIONS:-}"
for image in ${IMAGES:-api worker}; do
    more=()
    [ "$image" = api ] || more=("${worker_options[@]}")
    echo "Building pho-$image with $BUILDER."
    "$BUILDER" build --file "docker/$image.Dockerfile" --tag "pho-$image" "${options[@]}" "${more[@]}" .
done
