#!/usr/bin/env bash
# Environments of the peers that benchmarks/training_speed compares with; none is a dependency of the project.
#   benchmarks/peers.sh [flag_embedding] [sentence_transformers]      default: both
# DRY_RUN=1 prints the commands. PEERS: where they go; PYTHON: the interpreter; both have defaults.
set -euo pipefail
cd "$(dirname "$0")/.."
PEERS=${PEERS:-.peers}
PYTHON=${PYTHON:-$(command -v python3.11 || command -v python3)}

run() { if [ -n "${DRY_RUN:-}" ]; then echo "$@"; else "$@"; fi; }

install() {  # NAME PACKAGES...: torch, transformers and peft of the project's own versions, so that libraries do not differ
    run "$PYTHON" -m venv "$PEERS/$1"
    run "$PEERS/$1/bin/pip" install --quiet --constraint constraints.txt torch==2.13.0 "${@:2}"
}

[ $# -gt 0 ] || set -- flag_embedding sentence_transformers
for name in "$@"; do
    case $name in
        flag_embedding) install "$name" FlagEmbedding==1.4.2 ;;
        sentence_transformers) install "$name" sentence-transformers==6.2.0 accelerate datasets peft ;;
        *) echo "$name: no such peer: take flag_embedding or sentence_transformers" >&2; exit 2 ;;
    esac
done
