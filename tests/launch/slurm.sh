#!/usr/bin/env bash
# A Slurm cluster of this one machine, for tests. Debian's slurm-wlm and munge; everything else is in a directory.
#
#   tests/launch/slurm.sh install          # as root, from Debian
#   tests/launch/slurm.sh start DIRECTORY PORT PORT  # then: export SLURM_CONF=DIRECTORY/slurm.conf
#   tests/launch/slurm.sh stop DIRECTORY
set -euo pipefail

install() {
  command -v slurmctld slurmd munged > /dev/null && return
  timeout 300 apt-get update -qq
  DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y -qq --no-install-recommends slurm-wlm munge
}

start() {
  local directory host
  directory=$(realpath "$1")
  host=$(hostname -s)
  mkdir -p "$directory"/{state,spool,munge}
  chmod 755 "$directory" "$directory/munge"
  head -c 1024 /dev/urandom > "$directory/munge/key"
  chmod 400 "$directory/munge/key"
  munged --force --key-file="$directory/munge/key" --socket="$directory/munge/socket" \
    --pid-file="$directory/munge/pid" --log-file="$directory/munge/log" --seed-file="$directory/munge/seed"
  # cred_expire: a requeued job waits until its old credentials have expired.
  cat > "$directory/slurm.conf" << END
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$directory/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$2
SlurmdPort=$3
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=30
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
  export SLURM_CONF=$directory/slurm.conf
  slurmctld
  slurmd
}

stop() {
  local file
  for file in "$1"/slurmd.pid "$1"/slurmctld.pid "$1"/munge/pid; do
    [[ -f $file ]] && kill "$(cat "$file")" 2> /dev/null || true
  done
}

"$@"
