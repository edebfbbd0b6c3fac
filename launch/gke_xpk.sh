#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as a JobSet that xpk makes.
#
#   launch/gke_xpk.sh --name=mine --cluster=tpus --project=P --zone=us-east5-b --tpu_type=v6e-64 \
#     --image=REGION-docker.pkg.dev/P/dpcap/dpcap:1 --storage=runs -- --config=... --workdir=/runs/mine
#
# --name      of the workload; one that exists is refused
# --cluster --project --zone   where the cluster is
# --tpu_type  as v6e-64; its hosts make one slice
# --slices    how many of these; 1
# --image     a container image with dpcap and jax[tpu], dpcap being its working directory
# --storage   name under which `xpk storage` knows the shared file system that holds the workdir
# --python    in the image; python3
# --restarts  of all hosts, at most; 100
# --grace     seconds that a host has for saving after SIGTERM; 300
# --dry_run   print the command, start nothing
#
# JobSet starts all hosts again when one ends with a status that is worth it: 75, or above 126,
# which 143 and the deaths by a signal are. Status 2 ends the workload.

set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

name='' cluster='' project='' zone='' tpu_type='' slices=1 image='' storage=''
python=python3 restarts=100 grace=300
read_settings 'name cluster project zone tpu_type slices image storage python restarts grace' "$@"

# xpk passes SIGTERM on to the shell that this line is for: exec puts Python in its place.
train=$(quoted exec env DPCAP_MULTIHOST=1 "$python" -m dpcap.train "${flags[@]}")

run xpk workload create --workload="$name" \
  --cluster="$cluster" --project="$project" --zone="$zone" \
  --tpu-type="$tpu_type" --num-slices="$slices" \
  --docker-image="$image" --storage="$storage" \
  --max-restarts="$restarts" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds="$grace" \
  --command="$train"
