#!/usr/bin/env bash
# The whole walk on phantom CT, from an empty machine to Alice's weights and the Dice of a network finetuned from them: 2 CPU
# cores, 7 minutes after the install, no downloads besides Python packages. A second run reuses every stage whose
# command has not changed.
#   bash scripts/quickstart.sh                        results in results/quickstart
#   QUICKSTART_DIR=/tmp/walk bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
source scripts/stage.sh

out="${QUICKSTART_DIR:-results/quickstart}"
mkdir -p "$out"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}"

stage "phantom CT" python scripts/make_phantom_dataset.py --out_dir "$out/data" --num_unlabelled 22 --num_labelled 6 --seed 0
stage "data list" python scripts/create_json.py --data_dir "$out/data" --output "$out/data.json" --cases unlabelled --num_validation 4
stage "volume store" python scripts/prepare_volumes.py --data_dir "$out/data" --json_list "$out/data.json" \
    --store_dir "$out/store" --spacing_mm 3 3 3
stage "embed" python scripts/generate_sam_embeddings.py --store_dir "$out/store" --embed_dir "$out/embeddings"
stage "mine pairs" python scripts/mine_pairs.py --embed_dir "$out/embeddings" --json_list "$out/data.json" \
    --num_points 64 --num_partners 4
stage "labelled list" python scripts/create_json.py --data_dir "$out/data" --output "$out/labelled.json" \
    --cases labelled --num_validation 4
# How good the matches are; and MONAI's SwinUNETR, a quarter of the recipe's steps: enough to see all terms of Alice and to have
# weights.
swin_unetr() {
    stage "evaluate matching" python scripts/evaluate_matching.py --store_dir "$out/store" --json_list "$out/data.json" \
        --sections validation --landmark_dir "$out/data/landmarks" --embed_dir "$out/embeddings" --num_points 32 \
        --output "$out/matching.json"
    stage "pretrain Alice" --own "$out/alice" python main_ddp.py --config configs/quickstart.yaml --data_dir "$out/data" \
        --json_list "$out/data.json" --store_dir "$out/store" --embed_dir "$out/embeddings" --output_dir "$out/alice" \
        --epochs 1 --warmup_epochs 0.5 --freeze_last_layer 0 --val_freq 1 --picture_freq 8
    stage "extract weights" python extract_backbone_weights.py "$out/alice/checkpoint.pth" "$out/alice_teacher.pth" \
        --checkpoint_key teacher
    stage "6 mm store, labelled" python scripts/prepare_volumes.py --data_dir "$out/data" --json_list "$out/labelled.json" \
        --store_dir "$out/store_6mm" --spacing_mm 6
}
# What is it good for? A U-Net at 6 mm is quick enough to pretrain, and to finetune with one labelled patient, with and without.
unet() {
    stage "6 mm store, data" python scripts/prepare_volumes.py --data_dir "$out/data" --json_list "$out/data.json" \
        --store_dir "$out/store_6mm" --spacing_mm 6
    stage "pretrain U-Net" --own "$out/alice_unet" python main_ddp.py --config configs/quickstart_unet.yaml \
        --data_dir "$out/data" --json_list "$out/data.json" --store_dir "$out/store_6mm" --spacing_mm 6 \
        --embed_dir "$out/embeddings" --output_dir "$out/alice_unet"
    stage "extract student" python extract_backbone_weights.py "$out/alice_unet/checkpoint.pth" "$out/alice_unet.safetensors" \
        --checkpoint_key student
}
side_by_side unet swin_unetr

# Which patient is labelled matters, so two are tried; all are judged on the same four, Alice's also without its memory.
budget=(--config configs/finetune_quickstart.yaml --backbone unet --feature_size 16 --roi_x 32 --roi_y 32 --roi_z 32 --spacing_mm 6
    --num_labelled 1 --resume none --data_dir "$out/data" --json_list "$out/labelled.json" --store_dir "$out/store_6mm")
label() { # FOLD
    local scratch="$out/finetune_scratch/$1" alice="$out/finetune_alice/$1"
    stage "scratch, label $1" python scripts/finetune_segmentation.py "${budget[@]}" --weights none --fold "$1" --output_dir "$scratch"
    stage "Alice, label $1" python scripts/finetune_segmentation.py "${budget[@]}" --weights "$out/alice_unet.safetensors" \
        --freeze_encoder_steps 100 --memory true --fold "$1" --output_dir "$alice"   # new layers first, then all
}
side_by_side "label 0" "label 1"
python scripts/quickstart_report.py --quickstart_dir "$out"
