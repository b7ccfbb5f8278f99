#!/bin/bash
#SBATCH --job-name=ecl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# One task is one training process on one GPU. From the root of the repository, with its environment active:
#   sbatch training/accelerate/slurm.sh --recipe training/recipes/imagenet_lt_resnet50.yaml --output_dir runs/imagenet_lt
# Five minutes before the time is over, and when the job is pre-empted, each process gets SIGTERM; together they write a
# checkpoint and end with exit code 75. The job is then queued again and continues from there.
set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# No launcher stands between Slurm and the processes: signals and exit codes pass unchanged.
# shellcheck disable=SC2016  # the variables are those of each task
srun bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec python training/train.py "$@" --resume' task "$@"
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
