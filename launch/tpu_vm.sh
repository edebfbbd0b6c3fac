#!/usr/bin/env bash
# Trains on a Cloud TPU slice, for which it queues again whenever it is preempted.
#
#   launch/tpu_vm.sh --name=mine --zone=us-east5-b --accelerator=v6e-64 --version=v2-alpha-tpuv6e \
#     --setup='mountpoint -q /nfs || sudo mount ADDRESS:/share /nfs' --directory=/nfs/dpcap \
#     --python=/nfs/env/bin/python -- --config=... --workdir=/nfs/runs/mine
#
# --name --zone  of the TPU and of the queued resource that asks for it
# --accelerator  as v6e-64; all its hosts train
# --version      of the TPU's software
# --setup        what every host does before each start; it makes the other paths appear
# --directory    where dpcap is, on the hosts
# --python       of an environment with dpcap and jax[tpu], on the hosts
# --spot         yes for a TPU that can be preempted, no otherwise; yes
# --restarts     of the run, at most; 100
# --dry_run      print the commands, start nothing
#
# The hosts train on when this script is killed; the same command starts them anew, from the last
# checkpoint. Ctrl-C or SIGTERM makes them save and stop. The TPU is yours to delete.

set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

name='' zone='' accelerator='' version='' setup='' directory='' python='' spot=yes restarts=100
read_settings 'name zone accelerator version setup directory python spot restarts' "$@"
[[ $spot == yes || $spot == no ]] || fail "--spot=$spot must be yes or no"

queue() {
  run gcloud compute tpus queued-resources "$@" --zone="$zone"
}

# Runs a shell command on one host or on all.
on() {
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"
}

# State of the queued resource, nothing if there is none.
state() {
  gcloud compute tpus queued-resources list --zone="$zone" --filter="name~/$name\$" \
    --format='value(state.state)' || echo UNKNOWN
}

create() {
  local kind=()
  if [[ $spot == yes ]]; then kind=(--spot); fi
  queue create "$name" --node-id="$name" --accelerator-type="$accelerator" \
    --runtime-version="$version" ${kind[@]+"${kind[@]}"}
}

# Waits for the TPU to be there, having asked for it if need be.
acquire() {
  while :; do
    case $(state) in
      ACTIVE) return ;;
      '') create ;;
      SUSPENDED) queue delete "$name" --force --quiet ;; # what remains of a preempted one
      FAILED) fail "the request for $name failed; gcloud says why, then delete it" ;;
    esac
    sleep 30
  done
}

# A service of systemd: it outlives the connection, one host has one at most, and its end can be
# asked for. systemd reads $ as a variable, $$ as itself.
stop='sudo systemctl stop dpcap 2>/dev/null; sudo systemctl reset-failed dpcap 2>/dev/null; true'
train=$(quoted "$python" -m dpcap.train "${flags[@]//\$/\$\$}")
start="$stop; $setup && sudo systemd-run --unit=dpcap --remain-after-exit --uid=\"\$(id -u)\" \
--working-directory=$(quoted "$directory") --setenv=DPCAP_MULTIHOST=1 \
--property=KillMode=mixed --property=TimeoutStopSec=600 \
--property=StandardOutput=append:/var/log/dpcap.log \
--property=StandardError=append:/var/log/dpcap.log $train"
# Shows the log until the service ends. Exits 0 if it is done, 2 if another start would not
# change how it ended, 75 otherwise; other statuses are of the connection.
# shellcheck disable=SC2016
attend='tail -n 5 -F /var/log/dpcap.log & while s=$(systemctl show dpcap --property=SubState '\
'--value); [ "$s" = running ]; do sleep 5; done; kill $!; case $s:$(systemctl show dpcap '\
'--property=ExecMainStatus --value) in exited:0) exit 0;; failed:[12]) exit 2;; *) exit 75;; esac'

if [[ $dry_run ]]; then
  create
  on all "$start"
  on 0 "$attend"
  exit
fi

trap 'on all "$stop" || true; exit 143' INT TERM
for ((attempt = 0; attempt <= restarts; attempt++)); do
  acquire
  status=0
  if ! on all "$start"; then
    # Setting up fails again on the same hosts; hosts that went away come back.
    if [[ $(state) == ACTIVE ]]; then fail "not all hosts of $name could start; see above"; fi
    status=75
  fi
  while ((status == 0)); do
    # In the background: a signal is handled at once, not when the run has ended.
    on 0 "$attend" &
    wait $! && exit
    status=$?
    if ((status == 2)); then exit 2; fi
    # The connection, not the run: look again.
    if ((status != 75)) && [[ $(state) == @(ACTIVE|UNKNOWN) ]]; then status=0; fi
    sleep 30
  done
  echo "launch: the run was interrupted; restart $((attempt + 1)) of $restarts" >&2
done
exit 75
