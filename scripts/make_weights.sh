#!/usr/bin/env bash
# Makes the weights that come with the repository, from phantoms on: SAM's with its card, the labelled phantoms, a network
# of their organs, and a pretrained U-Net's. Three and a half hours on two CPU cores. May be stopped and run again: what is
# done is kept, and the trainings go on.
#   bash scripts/make_weights.sh                      folder of the work: results/weights
#   WEIGHTS_DIR=/tmp/weights bash scripts/make_weights.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
source scripts/stage.sh

out="${WEIGHTS_DIR:-results/weights}"
mkdir -p "$out"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}"
data=(--data_dir "$out/data" --json_list "$out/data.json")

stage "phantom CT" python scripts/make_phantom_dataset.py --out_dir "$out/data" --num_unlabelled 0 --num_labelled 84 --seed 300
stage "data list" python scripts/create_json.py --data_dir "$out/data" --output "$out/data.json" --cases labelled --num_validation 20
stage "volume store" python scripts/prepare_volumes.py "${data[@]}" --store_dir "$out/store" --spacing_mm 4
stage "train SAM" --own "$out/sam" python scripts/train_sam.py --config configs/sam_phantom.yaml --val_cases 0 "${data[@]}" \
    --store_dir "$out/store" --output_dir "$out/sam"
stage "evaluate matching" python scripts/evaluate_matching.py --checkpoint_file "$out/sam/checkpoint_best.pth" "${data[@]}" \
    --sections validation --landmark_dir "$out/data/landmarks" --embed_dir "$out/embeddings" --output "$out/matching.json"
stage "pack" python scripts/pack_sam.py --checkpoint_file "$out/sam/checkpoint_best.pth" --matching "$out/matching.json" \
    --data_text "phantoms of this repository's generator 2 (seed 300), some with unusual anatomy and artefacts" \
    --output weights/sam_phantom.safetensors
stage "pack references" python scripts/pack_references.py "${data[@]}"
stage "train organs" --own "$out/organs" python scripts/finetune_segmentation.py --config configs/finetune_phantom.yaml "${data[@]}" \
    --store_dir "$out/store" --output_dir "$out/organs"
stage "publish organs" python scripts/push_to_hub.py --weights "$out/organs/best.pth" --half --output_dir "$out/published_organs" \
    --data "64 labelled phantoms of this repository's generator 2 (seed 300), with random contrast"
cp "$out/published_organs/model.safetensors" weights/organs_phantom.safetensors
stage "pretrain U-Net" python -m benchmarks.compare_pretraining --preset cpu --arms dense --pretrain_steps 300 \
    --sam_checkpoint weights/sam_phantom.safetensors --stages data,sam,pretrain --output_dir "$out/alice"
stage "extract U-Net" python extract_backbone_weights.py "$out/alice/pretrain/dense/seed0/checkpoint.pth" \
    "$out/alice_unet_phantom.safetensors" --checkpoint_key student --half
stage "without folders" python scripts/push_to_hub.py --weights "$out/alice_unet_phantom.safetensors" --output_dir "$out/published"
cp "$out/published/model.safetensors" weights/alice_unet_phantom.safetensors
