#!/usr/bin/env bash
# Debian packages that the tests of schedulers, databases and networks use; without root those tests skip.
set -euo pipefail
PACKAGES=(slurmctld slurmd slurm-client munge pdsh openssh-server iproute2 postgresql)
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "tests/system: not root on Debian: tests that need ${PACKAGES[*]} will skip"
elif ! dpkg --status "${PACKAGES[@]}" >/dev/null 2>&1; then
  apt-get update -qq
  # No service of the machine is started: the tests start their own, on ports and in folders of their own.
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}" >/dev/null
fi
