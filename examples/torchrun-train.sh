#!/bin/bash
# Stage two on 4 nodes of 8 GPUs: start this same script on every node; they meet at node1. The cache and the run's
# folder lie where all nodes see them. docs/scaling.md explains it.
torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:29400 --rdzv-id vit-b --max-restarts 3 \
    --no-python tec-cache train --cache CACHE --out runs/vit-b
