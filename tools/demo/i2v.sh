#!/usr/bin/env bash
# Teaches the bundled demo to begin with a picture, on one GPU: bash tools/demo/i2v.sh WORK [data] [train] [score]
#
# WORK gets data, cache, runs and samples (about 7 GB); $OUT (WORK/out) what is worth keeping: i2v/lora.safetensors, scores,
# strips, the loss. Without a part named, all three are done; each goes on where it was interrupted, and needs no network.
# May be set: CLIPS=14000 SPINS=2000 PROMPTS=64 WORKERS=(all cores) DEVICE=cuda OUT=WORK/out
# TRAIN_SECONDS=400: the training ends then at the latest, and what it has learned is saved
# STEPS: of the training; otherwise as many as fit, by the speed of a trial of TRIAL_STEPS=150
# BATCH=96 RATE=0.0015 RANK=64 SAMPLE_STEPS=20 GUIDANCE=(as configured)
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
work="${1:?usage: bash tools/demo/i2v.sh WORK [data] [train] [score]}"
parts=" ${*:2} "
[[ "$parts" != "  " ]] || parts=" data train score "
mkdir -p "$work" "${OUT:=$work/out}"
work="$(cd "$work" && pwd)" out="$(cd "$OUT" && pwd)"
cd "$repo"
# shellcheck source=tools/setup_env.sh
source tools/setup_env.sh

clips="${CLIPS:-14000}" spins="${SPINS:-2000}" prompts="${PROMPTS:-64}"
workers="${WORKERS:-$(getconf _NPROCESSORS_ONLN)}" device="${DEVICE:-cuda}"
seconds="${TRAIN_SECONDS:-400}" batch="${BATCH:-96}" rate="${RATE:-0.0015}" rank="${RANK:-64}"
unseen=(--count "$prompts" --seed 9 --two 0 --only-withheld --pictures)
stage() { echo "== $1 ($(date +%T))"; }
has() { [[ "$parts" == *" $1 "* ]]; }

draw() { # FOLDER, then the rest of the command
    [[ -e "$work/$1/meta.jsonl" ]] || "$PYTHON" tools/demo/make_dataset.py "$work/$1" "${@:2}" \
        --withheld tools/demo/withheld.json --workers "$workers"
}
if has data; then
    stage "clips"
    draw clips --count "$clips" --seed 31 --other-words 0.4 --motion-words 0.5
    draw spins --count "$spins" --seed 34 --two 0.15 --motion rotate --other-words 0.4 --motion-words 0.5
    stage "pictures of withheld combinations, under captions and under their motions alone"
    draw captions "${unseen[@]}"
    draw motions "${unseen[@]}" --motion-words 1
    stage "cache"
    "$PYTHON" tools/precompute_cache.py configs/demo_i2v_sft.yaml --cache-dir "$work/cache" --device "$device" \
        --workers "$workers" --set "args.train_data=[$work/clips,$work/spins]"
fi

learn() { # NAME, STEPS, SECONDS, then the rest of the command: exit codes 124 and 143 say that the time was over
    local code=0
    timeout --signal=TERM --kill-after=60 "$3" "$PYTHON" train_video.py configs/demo_i2v_sft.yaml \
        --cache-dir "$work/cache" --device "$device" --set "args.train_data=[$work/clips,$work/spins]" \
        --set "args.save=$work/runs" --set "args.experiment_name=demo-$1" --set "args.train_iters=$2" \
        --set "deepspeed.train_micro_batch_size_per_gpu=$batch" --set "deepspeed.optimizer.params.lr=$rate" \
        --set "model.network_config.params.modules.lora_config.params.r=$rank" "${@:4}" || code=$?
    ((code == 0 || code == 124 || code == 143)) || return "$code"
    run="$(ls -td "$work/runs/demo-$1"-*/ | head -1)"
}
if has train; then
    if [[ -n "${STEPS:-}" ]]; then
        echo "$STEPS" >"$work/steps"
    elif [[ ! -e "$work/steps" ]]; then
        stage "trial"
        trial="${TRIAL_STEPS:-150}"
        learn trial "$trial" 150 --set "args.log_interval=$((trial / 3))" --set args.tensorboard=false
        "$PYTHON" - "$run/metrics.jsonl" "$batch" "$seconds" >"$work/steps" <<'EOF'
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
rate = [line["samples_per_second"] for line in lines if line["kind"] == "train"][-1]
print(max(10, int(0.9 * (float(sys.argv[3]) - 25) * rate / int(sys.argv[2]))))  # 25 s: start and end
EOF
    fi
    steps="$(cat "$work/steps")"
    stage "training, $steps steps, at most $seconds s"
    trained="$(cat "$work"/runs/demo-i2v-*/latest 2>/dev/null | sort -n | tail -1 || true)"
    if [[ "$trained" == "$steps" ]]; then
        run="$(ls -td "$work"/runs/demo-i2v-*/ | head -1)"
    else
        learn i2v "$steps" "$seconds" --resume
    fi
    cp "$run/metrics.jsonl" "$out/"
    [[ ! -e "$run/loss.png" ]] || cp "$run/loss.png" "$out/"
    reached="$(cat "$run/latest")"
    [[ -e "$run$reached-ema" ]] && reached="$reached-ema"
    "$PYTHON" tools/demo/bundle_adapter.py i2v "$run$reached" --out "$out"
fi

sample() { # FOLDER of samples and of pictures
    "$PYTHON" sample_video.py configs/demo_i2v_infer.yaml --lora "$out/i2v" --input-file "$work/$1/prompts.txt" \
        --output-dir "$work/samples_$1" --device "$device" --skip-done --steps "${SAMPLE_STEPS:-20}" \
        ${GUIDANCE:+--guidance-scale "$GUIDANCE"} >"$work/samples_$1.log" 2>&1 || { tail -20 "$work/samples_$1.log"; return 1; }
}
if has score; then
    stage "samples"
    sample captions &
    making=$!
    sample motions
    wait "$making"
    stage "scores: the drawn clips, then samples by caption and by motion alone"
    "$PYTHON" tools/demo/score_pictures.py "$work/captions" --json "$out/drawn.json" --workers "$workers"
    for made in captions motions; do
        "$PYTHON" tools/demo/score_pictures.py "$work/$made" --samples "$work/samples_$made" --json "$out/$made.json" \
            --workers "$workers" --wrong 20
        "$PYTHON" tools/demo/strips.py "$work/samples_$made" --out "$out/strips_$made.jpg" --count 16
    done
fi
stage "done"
