#!/usr/bin/env bash
# Debian packages that the tests of schedulers, databases and networks use; without root those tests skip.
set -euo pipefail
PACKAGES=(slurmctld slurmd slurm-client munge pdsh openssh-server iproute2 postgresql)
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "tests/system: not root on Debian: tests that need ${PACKAGES[*]} will skip"
elif ! dpkg --status "${PACKAGES[@]}" >/dev/null 2>&1; then
  # No service of the machine is started: the tests start their own, on ports and in folders of their own. But Debian
  # enables what it installs: on a machine that boots again, disable munge, slurmctld, slurmd, ssh and postgresql if they
  # are not wanted. Nothing is disabled here, because one of them may have been there before.
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}" >/dev/null; }; then
    echo "tests/system: apt-get failed, see above: tests that need what is missing of ${PACKAGES[*]} will skip"
  fi
fi
