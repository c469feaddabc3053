#!/usr/bin/env bash
# sbatch slurm/train.sh, from the repository. Settings come from the environment, which sbatch passes on (or --export),
# or from the file that FT_ENV_FILE names. FT_CONTAINER chooses an image; without it the job runs from .venv.
#SBATCH --job-name=finetune
#SBATCH --partition=gpu                     # EDIT
##SBATCH --account=my-account               # EDIT
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=finetune-%j.log
#SBATCH --signal=B:USR1@120
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 78

# An array's id may be that of one of its elements: to Slurm's commands each of them has a longer name.
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
job="${job:-$SLURM_JOB_ID}"
# Less than the 120 s above; on preemption the partition's GraceTime counts, and must be longer.
export FT_STOP_GRACE_SECONDS="${FT_STOP_GRACE_SECONDS:-90}"
# How each node ended, one file a node: srun's exit code is one for all.
export FT_TERMINATION_LOG="$PWD/finetune-$SLURM_JOB_ID.ends"
unfit_nodes="$PWD/finetune-$SLURM_JOB_ID.unfit"
export FT_OUTPUT_DIR="${FT_OUTPUT_DIR:-$PWD/results}"
rm -rf "$FT_TERMINATION_LOG" && mkdir -p "$FT_TERMINATION_LOG" "$PWD/results" || exit 69

python=python3
[ -x .venv/bin/python ] && python="$PWD/.venv/bin/python"
options=(--ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0)
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK") # srun does not inherit it
case "${FT_CONTAINER:-}" in
  "")
    "$python" -c 'import pydantic_settings' || { echo "Make .venv from requirements.txt, or set FT_CONTAINER." >&2 && exit 78; }
    launch=("$python" entrypoint.py)
    ;;
  *.sif)
    [ -f "$FT_CONTAINER" ] || { echo "FT_CONTAINER=$FT_CONTAINER: there is no such file." >&2 && exit 78; }
    launch=(apptainer exec --nv --bind "$PWD,$PWD/results:/work" --pwd "$PWD" --env "FT_OUTPUT_DIR=$FT_OUTPUT_DIR" "$FT_CONTAINER" python3 /app/entrypoint.py)
    ;;
  *)
    launch=(python3 /app/entrypoint.py)
    options+=(--container-image="$FT_CONTAINER" --container-mounts="$PWD:$PWD,$PWD/results:/work" --container-workdir="$PWD" --container-env=FT_OUTPUT_DIR)
    ;;
esac

# Slurm tells only this shell of the time limit, and only the step of a preemption. A node that fails ends the others by
# itself, in time to store a checkpoint, and those that are done early must not be waited for: so no kill, and no wait.
srun "${options[@]}" "${launch[@]}" run &
step=$!
trap 'interrupted=1; scancel --signal=TERM "$job"' USR1 TERM INT
while :; do # a trapped signal ends wait early, with a status that is not the step's
  interrupted=0
  wait "$step"
  code=$?
  [ "$interrupted" = 1 ] || break
done

# What fails on one node fails the job; else a node that is unfit is remembered; else the job was stopped.
for wanted in 65 77 78 70; do
  if grep -qs "\"exit_code\": $wanted," "$FT_TERMINATION_LOG"/*.json; then code=$wanted && break; fi
done
(cd "$FT_TERMINATION_LOG" && grep -ls '"exit_code": 69,' -- *.json) | sed 's/\.json$//' >>"$unfit_nodes"
rm -rf "$FT_TERMINATION_LOG"
# Cancelled or preempted, the job is Slurm's to end or to requeue.
[ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ] || exit "$code"
case "$code" in
  75 | 69)
    if [ "$(sort -u "$unfit_nodes" | wc -l)" -gt 3 ]; then
      echo "Four nodes were unfit, so it may not be the nodes: not requeued." >&2
      exit 69
    fi
    excluded=$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^ (]*\).*/\1/p')
    trap '' TERM # which Slurm sends on a requeue; only from then on can the excluded nodes be changed
    scontrol requeue "$job"
    [ ! -s "$unfit_nodes" ] || scontrol update "JobId=$job" "ExcNodeList=${excluded:+$excluded,}$(sort -u "$unfit_nodes" | paste -sd,)"
    ;;
  *) rm -f "$unfit_nodes" ;;
esac
exit "$code"
