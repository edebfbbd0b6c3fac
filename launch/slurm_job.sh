#!/usr/bin/env bash
# The job that launch/slurm.sh submits: slurm_job.sh RESTARTS CPUS COMMAND...

set -euo pipefail
restarts=$1 cpus=$2
shift 2

# Every task sees all GPUs of its node, and JAX takes the one of its number there. A process has
# 90 s to notice that another one died; it needs 30.
step=(env DPCAP_MULTIHOST=1 srun --cpus-per-task="$cpus" --kill-on-bad-exit=0 --wait=90 "$@")
if [[ ${DRY_RUN-} ]]; then
  printf '%q ' "${step[@]}"
  echo
  exit
fi

status=0
"${step[@]}" || status=$?
case $status in
  0 | 1 | 2) exit "$status" ;; # done, or wrong in a way that the next start would not change
esac
if ((${SLURM_RESTART_COUNT:-0} >= restarts)); then
  echo "launch: status $status; that was the last of $restarts restarts" >&2
  exit "$status"
fi
# Not a job that scancel ends, or that Slurm itself has put back: those are no longer running.
echo "launch: status $status; requeued if the job is still running" >&2
scontrol requeue Incomplete "$SLURM_JOB_ID" || true
exit "$status"
