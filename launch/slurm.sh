#!/usr/bin/env bash
# Trains on nodes of a Slurm cluster, one process per GPU.
#
#   launch/slurm.sh --nodes=4 --gpus_per_node=8 -- --config=... --workdir=/shared/runs/mine
#
# --nodes          how many
# --gpus_per_node  of each node, which is also the number of its processes
# --cpus           of each process, which its data workers share; 8
# --name           of the job; dpcap
# --python         on the nodes; .venv/bin/python
# --restarts       of the job, at most; 100
# --grace          seconds before the time limit at which the run is told to save; 300
# --dry_run        print the commands, submit nothing
#
# What the site needs besides goes into sbatch's own variables: SBATCH_PARTITION, SBATCH_ACCOUNT,
# SBATCH_TIMELIMIT. Call it in the repository, on a file system that the nodes see.

set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

nodes='' gpus_per_node='' cpus=8 name=dpcap python=.venv/bin/python restarts=100 grace=300
read_settings 'nodes gpus_per_node cpus name python restarts grace' "$@"

# The signal goes to the processes, not to the script that waits for them.
run sbatch --job-name="$name" --nodes="$nodes" \
  --gpus-per-node="$gpus_per_node" --ntasks-per-node="$gpus_per_node" --cpus-per-task="$cpus" \
  --requeue --open-mode=append --signal="TERM@$grace" \
  "$(dirname "$0")/slurm_job.sh" "$restarts" "$cpus" "$python" -m dpcap.train "${flags[@]}"
if [[ $dry_run ]]; then
  echo '# and in the job, on its first node:'
  DRY_RUN=1 bash "$(dirname "$0")/slurm_job.sh" "$restarts" "$cpus" "$python" -m dpcap.train "${flags[@]}"
fi
