#!/usr/bin/env bash
echo "error: the original's finetune_multi_gpus.sh is finetune.sh here: NPROC=8 bash finetune.sh configs/cogvideox_2b_sft.yaml" >&2
exit 2
