#!/bin/bash
# One notebook as a Slurm job. Submit it from the project's folder, with the notebook and its parameters:
#
#     sbatch docs/slurm/notebook.sh midtrain --out /shared/runs/midtrain -p seeds 0 -p steps 2000
#
# Three minutes before the time limit the runs save and stop. The same command continues them in another job.
#SBATCH --job-name=refine
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --output=%x-%j.txt

cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
. "${REFINE_VENV:-.venv}/bin/activate"
# `exec`, so that Slurm's signal reaches Python, which ends when all runs have saved
exec python -u -m refine_lab.sweep "$@"
