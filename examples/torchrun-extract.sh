#!/bin/bash
# Stage one on 4 nodes of 8 GPUs: start this same script on every node; they meet at node1. The cache lies where all
# nodes see it. docs/scaling.md explains it.
torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:29400 --rdzv-id mae --max-restarts 3 \
    --no-python tec-cache extract 'imagenet/train-{000000..001280}.tar' --cache CACHE --base mae
