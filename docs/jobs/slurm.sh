#!/bin/bash
# A fewlabels run on one or more machines that survives preemption and time limits: edit, then `sbatch slurm.sh`.
#SBATCH --job-name=fewlabels
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM to every process of the job 120 s before the end: enough for a step and a checkpoint
#SBATCH --signal=TERM@120

set -uo pipefail

IMAGES=${IMAGES:-/shared/images}
LABELS=${LABELS:-/shared/labels.csv}
OUT=${OUT:-/shared/runs/first}      # on a disk that all machines see
GPUS=${GPUS:-8}                     # processes a machine
MOST_RESTARTS=3                     # of the processes, after one died; a requeue is another matter
PORT=${PORT:-29500}

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS" --max-restarts "$MOST_RESTARTS" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:$PORT" \
    -m fewlabels fit "$IMAGES" --labels "$LABELS" --out "$OUT" "$@" &
run=$!
trap : TERM  # a preemption signals this shell too, which has to see how the run ends
while kill -0 "$run" 2>/dev/null; do
    wait "$run"
    code=$?
done

# torchrun has an exit code of its own (1) for whatever ended its processes; status.json says what it was
state=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$OUT/status.json" 2>/dev/null)
echo "torchrun ended with $code, the run is ${state:-not begun}"
if [ "$state" = stopped ] || [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
