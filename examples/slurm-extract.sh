#!/bin/bash
#SBATCH --job-name=tec-extract
#SBATCH --array=0-15
#SBATCH --gpus=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# Stage one as a job array: each task makes one part on one GPU. Set parts, photos and cache. docs/scaling.md explains it.

parts=16
photos='imagenet/train-{000000..001280}.tar'
cache=CACHE

stopped=no
trap 'stopped=yes; kill -TERM "$job"' TERM

tec-cache extract "$photos" --cache "$cache" --base mae --part "$((SLURM_ARRAY_TASK_ID + 1))/$parts" &
job=$!
# a signal ends the first wait, not the job
while wait "$job"; code=$?; kill -0 "$job" 2>/dev/null; do :; done
if [ "$stopped" = yes ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
