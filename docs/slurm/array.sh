#!/bin/bash
# A sweep as a Slurm array job: each task executes cells that no other task has begun. Submit it from the project's folder:
#
#     sbatch --array=0-7 docs/slurm/array.sh midtrain --out /shared/runs/lr -p lr 1e-4,3e-4 -p seeds 0:8
#
# Three minutes before the time limit the runs save and stop. The same command continues what is unfinished.
#SBATCH --job-name=refine-sweep
#SBATCH --array=0-7
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --output=%x-%A-%a.txt

cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
. "${REFINE_VENV:-.venv}/bin/activate"
exec python -u -m refine_lab.sweep "$@"
