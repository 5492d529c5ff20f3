#!/usr/bin/env bash
# Trains the bundled demo from nothing on one GPU: bash tools/demo/reproduce.sh WORK (on several: GPUS=2)
#
# WORK gets data, cache, runs, samples and scores (about 21 GB); WORK/demo is what the repository bundles as demo/.
# Every stage is skipped when its result is there, so the same command goes on after an interruption.
# Sizes may be set: CLIPS=30000 SPINS=8000 VAE_SECONDS=450 TEST_CLIPS=48 TEXT_SECONDS=190 SHORT=10000 ITERATIONS=21000
# SPIN_STEPS=14000 BATCH=96 SMALL_SECONDS=100 STUDENT_PROMPTS=12000 STUDENT_STEPS=2600 WORKERS=14 PROMPTS=64 SEEDS=4
# DEVICE=cuda. SHORT are steps on images and 17 frames, ITERATIONS on whole clips in batches of BATCH a GPU; in SPIN_STEPS
# more half of the clips show shapes that turn, the one motion that needs many more samples; STUDENT_STEPS are those of the
# distillation.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
work="${1:?usage: bash tools/demo/reproduce.sh WORK}"
mkdir -p "$work"
work="$(cd "$work" && pwd)"
cd "$repo"
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

clips="${CLIPS:-30000}" spins="${SPINS:-8000}" text_seconds="${TEXT_SECONDS:-190}"
vae_seconds="${VAE_SECONDS:-450}" test_clips="${TEST_CLIPS:-48}"
short="${SHORT:-10000}" iterations="${ITERATIONS:-21000}" spin_steps="${SPIN_STEPS:-14000}" batch="${BATCH:-96}"
small_seconds="${SMALL_SECONDS:-100}" workers="${WORKERS:-14}" prompts="${PROMPTS:-64}" seeds="${SEEDS:-4}" device="${DEVICE:-cuda}"
student_prompts="${STUDENT_PROMPTS:-12000}" student_steps="${STUDENT_STEPS:-2600}"
weights=(
    --set "model.first_stage_config.params.ckpt_path=$work/vae/3d-vae.pt"
    --set "model.conditioner_config.params.emb_models.0.params.model_dir=$work/t5"
)
gpus="${GPUS:-1}"
many=("$PYTHON")
if ((gpus > 1)); then many+=(-m torch.distributed.run --standalone --nproc_per_node="$gpus"); fi
stage() { echo "== $1 ($(date +%T))"; }

making=()
if [[ ! -e "$work/clips/meta.jsonl" ]]; then
    stage "clips"
    "$PYTHON" tools/demo/make_dataset.py "$work/clips" --count "$clips" --seed 1 --other-words 0.55 \
        --withheld tools/demo/withheld.json --workers "$workers" &
    making+=($!)
fi
if [[ ! -e "$work/spins/meta.jsonl" ]]; then
    stage "clips of shapes that turn"
    "$PYTHON" tools/demo/make_dataset.py "$work/spins" --count "$spins" --seed 4 --two 0.15 --motion rotate \
        --other-words 0.6 --withheld tools/demo/withheld.json --workers "$workers" &
    making+=($!)
fi
if [[ ! -e "$work/t5/spiece.model" ]]; then
    stage "text encoder"
    "$PYTHON" tools/demo/train_text.py --out "$work/t5" --seconds "$text_seconds" --held-words 0.3 \
        --device "$device" --workers 5
fi
if [[ ! -e "$work/vae/3d-vae.pt" ]]; then
    stage "VAE"
    "$PYTHON" tools/demo/train_vae.py "$work" --config configs/demo_infer.yaml --seconds "$vae_seconds" \
        --device "$device" --workers "$workers" --test-clips "$test_clips"
fi
for drawing in "${making[@]}"; do wait "$drawing"; done

stage "cache"
"${many[@]}" tools/precompute_cache.py configs/demo_sft.yaml tools/demo/pretrain.yaml --cache-dir "$work/cache" \
    --device "$device" --set "args.train_data=[$work/clips,$work/spins]" "${weights[@]}"

learn() { # NAME, folders with a comma between, then the rest of the command; goes on where an earlier run of it stopped
    "${many[@]}" train_video.py configs/demo_sft.yaml tools/demo/pretrain.yaml --cache-dir "$work/cache" \
        --device "$device" --resume --set "args.train_data=[$2]" --set "args.save=$work/runs" \
        --set "args.experiment_name=demo-$1" "${weights[@]}" "${@:3}"
    run="$(ls -td "$work/runs/demo-$1"-*/ | head -1)"
}
if [[ ! -e "$work/demo/SHA256SUMS" ]]; then
    stage "transformer: images and 17 frames"
    learn short "$work/clips" --set "args.train_iters=$short" --set args.lr_decay_ratio=0.2 \
        --set "args.cache_lengths=[1,17]"
    begun="$run$short-ema"
    stage "transformer: 49 frames"
    learn whole "$work/clips" --set "args.train_iters=$iterations" --set "args.load=$begun" \
        --set deepspeed.optimizer.params.lr=0.0015 --set "deepspeed.train_micro_batch_size_per_gpu=$batch"
    begun="$run$iterations-ema"
    stage "transformer: half of the clips turn"
    learn spins "$work/clips,$work/spins" --set "args.train_iters=$spin_steps" --set "args.load=$begun" \
        --set "args.train_data_weights=[0.5,0.5]" \
        --set deepspeed.optimizer.params.lr=0.0012 --set "deepspeed.train_micro_batch_size_per_gpu=$batch"
    "$PYTHON" tools/demo/bundle.py --transformer "$run$spin_steps-ema" --vae "$work/vae/3d-vae.pt" \
        --text "$work/t5" --out "$work/demo"
fi

sample() { # FOLDER, PROMPTS, then the rest of the command: by the bundled weights
    "$PYTHON" sample_video.py configs/demo_infer.yaml --output-dir "$1" --input-file "$2" --device "$device" --skip-done \
        --load "$work/demo/transformer" --set "model.first_stage_config.params.ckpt_path=$work/demo/vae/3d-vae.pt" \
        --set "model.first_stage_config.params.small_decoder=$work/demo/vae/small_decoder.safetensors" \
        --set "model.conditioner_config.params.emb_models.0.params.model_dir=$work/demo/t5" "${@:3}"
}
if [[ ! -e "$work/demo/vae/small_decoder.safetensors" ]]; then
    stage "small decoder"
    cat "$work"/clips/labels/000*.txt > "$work/small_prompts.txt"
    sample "$work/small_latents" "$work/small_prompts.txt" --only-save-latents
    "$PYTHON" tools/train_decoder.py configs/demo_infer.yaml "$work/small" --vae "$work/demo/vae/3d-vae.pt" \
        --latents "$work/small_latents" --seconds "$small_seconds" --widths 96,64,64,24 --blocks 1,1,2,1 --batch 6 \
        --rate 0.0015 --memory 8 --device "$device"
    "$PYTHON" tools/demo/bundle.py --small-decoder "$work/small/small_decoder.safetensors" --out "$work/demo"
fi
if [[ ! -e "$work/demo/student/lora.safetensors" ]]; then
    stage "student of four passes"
    "$PYTHON" tools/demo/make_prompts.py "$work/student.txt" --count "$student_prompts" --seed 21 \
        --withheld tools/demo/withheld.json
    "$PYTHON" train_video.py configs/demo_infer.yaml configs/distill.yaml tools/demo/distill.yaml --device "$device" \
        --resume --set "args.load=$work/demo/transformer" --set "args.distill.prompts=$work/student.txt" \
        --set "args.train_iters=$student_steps" --set "args.save=$work/runs" "${weights[@]}"
    run="$(ls -td "$work/runs/demo-student"-*/ | head -1)"
    "$PYTHON" tools/demo/bundle_adapter.py student "$run$student_steps-ema" --out "$work/demo"
fi

stage "score"
"$PYTHON" tools/demo/make_dataset.py "$work/unseen" --count "$prompts" --seed 9 --two 0 --withheld tools/demo/withheld.json \
    --only-withheld --workers "$workers"
cat "$work"/unseen/labels/*.txt > "$work/prompts.txt"
sample "$work/samples" "$work/prompts.txt" --batch-size "$seeds"
sample "$work/samples_small" "$work/prompts.txt" --batch-size "$seeds" --decoder small
for made in samples samples_small; do
    "$PYTHON" tools/demo/score.py "$work/$made" --json "$work/$made.json" --workers "$workers"
done
"$PYTHON" tools/demo/strips.py "$work/samples" --out "$work/strips.jpg"

stage "score of the student"
"$PYTHON" tools/demo/make_prompts.py "$work/unseen.txt" --count "$prompts" --seed 9 --two 0 --other-words 1 \
    --rotating 0 --withheld tools/demo/withheld.json --only-withheld --meant "$work/unseen.jsonl"
sample "$work/samples_student" "$work/unseen.txt" --lora "$work/demo/student"
"$PYTHON" tools/demo/score.py "$work/samples_student" --meant "$work/unseen.jsonl" --json "$work/student.json" \
    --workers "$workers"
