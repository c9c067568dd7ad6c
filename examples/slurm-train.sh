#!/bin/bash
#SBATCH --job-name=tec-train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=128
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# Stage two on 4 nodes of 8 GPUs, requeued at its time limit until it is done. Set cache and run. docs/scaling.md explains it.

cache=CACHE
run=runs/vit-b
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

stopped=no
# to every process of the job's steps. srun must not be signalled itself: it kills its tasks at once
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --rdzv-backend c10d \
    --rdzv-endpoint "$head:$port" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --max-restarts 3 \
    --no-python tec-cache train --cache "$cache" --out "$run" &
job=$!
while wait "$job"; code=$?; kill -0 "$job" 2>/dev/null; do :; done
if [ "$stopped" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
