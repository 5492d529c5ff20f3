#!/usr/bin/env bash
echo "error: the original's finetune_single_gpu.sh is finetune.sh here: bash finetune.sh configs/cogvideox_2b_sft.yaml" >&2
exit 2
