set -u
export PYTHONUNBUFFERED=1
mkdir -p /tmp/site
if [ ! -e /tmp/site/.done ]; then python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target /tmp/site .whl/*.whl && touch /tmp/site/.done; fi
export PYTHONPATH=/tmp/site:$PWD/.whl/stub
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
W=/tmp/w
time python3 tools/make_weights.py --config configs/cogvideox_2b_infer.yaml --out $W --device cuda
ls -la $W/*
S="--load $W/transformer --set model.first_stage_config.params.ckpt_path=$W/vae/3d-vae.pt --set model.conditioner_config.params.emb_models.0.params.model_dir=$W/t5"
head -2 configs/test.txt > /tmp/p2.txt; head -1 configs/test.txt > /tmp/p1.txt
for p in all stages lean; do
 f=/tmp/p1.txt; [ $p = all ] && f=/tmp/p2.txt
 echo "== $p"; timeout 170 python3 sample_video.py configs/cogvideox_2b_infer.yaml $S --input-file $f --placement $p --output-dir /tmp/out/$p 2>&1 | tr '\r' '\n' | grep -v "%|" | tail -25
done
python3 - <<'PY'
import glob, json, decord
for f in sorted(glob.glob('/tmp/out/*/*/0/000000.json')):
    r=json.load(open(f)); v=decord.VideoReader(f[:-4]+'mp4')
    print(f, len(v), v[0].shape, v.get_avg_fps(), r['latents_sha256'], r['seconds'], {k: round(x/2**30,2) for k,x in r['peak_memory_bytes'].items()})
PY
cp /tmp/out/all/*/0/*.png $OUT/ 2>/dev/null
for d in /tmp/out/*/0_*/0; do cp $d/000000.json $OUT/$(echo $d | cut -d/ -f4).json; done
