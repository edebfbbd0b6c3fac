#!/usr/bin/env bash
# Trains on GPU machines of a cloud or Kubernetes, as a managed job of SkyPilot.
#
#   launch/sky.sh --nodes=2 --gpus=H100:8 --infra=gcp \
#     --setup='mountpoint -q /runs || sudo mount ADDRESS:/share /runs' -- --config=... --workdir=/runs/mine
#
# --nodes    how many; one process each, with all its GPUs
# --gpus     of each node, as H100:8
# --infra    where, as gcp or aws/us-east-1 or k8s
# --name     of the job; dpcap
# --setup    what every node does before each start; it makes the workdir's file system appear
# --spot     yes for machines that can be preempted, no otherwise; yes
# --extra    what pip installs with dpcap; cuda
# --dry_run  print the command, launch nothing

set -euo pipefail
here=$(dirname "$0")
# shellcheck source=launch/common.sh
. "$here/common.sh"

nodes='' gpus='' infra='' name=dpcap setup='' spot=yes extra=cuda
read_settings 'nodes gpus infra name setup spot extra' "$@"
case $spot in
  yes) kind=--use-spot ;;
  no) kind=--no-use-spot ;;
  *) fail "--spot=$spot must be yes or no" ;;
esac

run sky jobs launch --yes --name="$name" --num-nodes="$nodes" --gpus="$gpus" --infra="$infra" \
  "$kind" --env="SETUP=$setup" --env="EXTRA=$extra" --env="FLAGS=$(quoted "${flags[@]}")" \
  "$here/sky.yaml"
