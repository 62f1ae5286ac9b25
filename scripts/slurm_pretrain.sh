#!/usr/bin/env bash
# Pretrain under Slurm, on one node or several, for as many time limits as it takes: Slurm warns the run two minutes
# before the limit (SIGUSR1), the run writes a checkpoint and ends with 75, and the job puts itself back into the queue.
# Submit it from the repository, with the environment active; every argument goes to main_ddp.py:
#
#   sbatch --nodes=4 scripts/slurm_pretrain.sh --config configs/alice_swinunetr.yaml --data_dir DATA \
#       --json_list DATA.json --store_dir STORE --embed_dir EMBEDDINGS --output_dir results/run
#
# sbatch's own flags change what stands below: --nodes, --ntasks-per-node and --gpus-per-node (both: GPUs of a node),
# --cpus-per-task (--num_workers + 1), --time, --partition, --account. PYTHON names another interpreter.
# The store, the table and --output_dir lie on a disk that all nodes see.
#
#SBATCH --job-name=alice
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=5
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

interrupted=75  # engine/signals.py

cd "$SLURM_SUBMIT_DIR"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
WORLD_SIZE=$SLURM_NTASKS
export MASTER_ADDR MASTER_PORT WORLD_SIZE
export PYTHON="${PYTHON:-python}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # as torchrun does
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # newer versions of srun do not take it over by themselves

# One process for each GPU, started by srun itself: torchrun between them would keep signals and exit codes to itself.
# A task that sees a single GPU was given its own by Slurm, and that one is number 0.
# shellcheck disable=SC2016  # expanded by each task
task='
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
case "${CUDA_VISIBLE_DEVICES-}" in
    "" | *,*) ;;
    *) LOCAL_RANK=0 ;;
esac
exec "$PYTHON" main_ddp.py "$@"
'

echo "job $SLURM_JOB_ID: $WORLD_SIZE processes, rank 0 on $MASTER_ADDR:$MASTER_PORT, restarts: ${SLURM_RESTART_COUNT:-0}"
# The processes leave together, also after an interruption; one that died alone ends the others 20 s later.
status=0
srun --wait=20 bash -c "$task" task "$@" || status=$?

if [[ $status -eq $interrupted ]]; then
    echo "job $SLURM_JOB_ID: interrupted after a checkpoint, back to the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
