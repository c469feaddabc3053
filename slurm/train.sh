#!/usr/bin/env bash
# Run `sbatch slurm/train.sh` in the repository. Settings come from the environment, which sbatch passes on (or --export),
# or from the file that FT_ENV_FILE names. FT_CONTAINER selects an image. Without it, the job runs from .venv.
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

# One element of an array has the array's own id as its SLURM_JOB_ID. Only the longer name means that element alone.
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
job="${job:-$SLURM_JOB_ID}"
# This must be less than the 120 s above. On preemption the partition's GraceTime applies instead, and must be longer.
export FT_STOP_GRACE_SECONDS="${FT_STOP_GRACE_SECONDS:-90}"
# One file per node says how that node ended, because srun has only one exit code for all of them.
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
    "$python" -c 'import pydantic_settings' || { echo "Create .venv from requirements.txt, or set FT_CONTAINER." >&2 && exit 78; }
    launch=("$python" entrypoint.py)
    ;;
  *.sif)
    [ -f "$FT_CONTAINER" ] || { echo "FT_CONTAINER=$FT_CONTAINER: no such file." >&2 && exit 78; }
    launch=(apptainer exec --nv --bind "$PWD,$PWD/results:/work" --pwd "$PWD" --env "FT_OUTPUT_DIR=$FT_OUTPUT_DIR" "$FT_CONTAINER" python3 /app/entrypoint.py)
    ;;
  *)
    launch=(python3 /app/entrypoint.py)
    options+=(--container-image="$FT_CONTAINER" --container-mounts="$PWD:$PWD,$PWD/results:/work" --container-workdir="$PWD" --container-env=FT_OUTPUT_DIR)
    ;;
esac

# Slurm signals the time limit only to this shell, and a preemption only to the step. A failing node stops the others
# itself, with time to store a checkpoint, and some nodes finish early. Hence --kill-on-bad-exit=0 and --wait=0.
srun "${options[@]}" "${launch[@]}" run &
step=$!
trap 'interrupted=1; scancel --signal=TERM "$job"' USR1 TERM INT
while :; do # a trapped signal interrupts wait, which then returns a status that is not the step's
  interrupted=0
  wait "$step"
  code=$?
  [ "$interrupted" = 1 ] || break
done

# A failure on any node fails the job. Otherwise an unfit node is recorded. Otherwise the job was stopped.
for wanted in 65 77 78 70; do
  if grep -qs "\"exit_code\": $wanted," "$FT_TERMINATION_LOG"/*.json; then code=$wanted && break; fi
done
(cd "$FT_TERMINATION_LOG" && grep -ls '"exit_code": 69,' -- *.json) | sed 's/\.json$//' >>"$unfit_nodes"
rm -rf "$FT_TERMINATION_LOG"
# If the job was cancelled or preempted, Slurm itself ends or requeues it.
[ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ] || exit "$code"
case "$code" in
  75 | 69)
    if [ "$(sort -u "$unfit_nodes" | wc -l)" -gt 3 ]; then
      echo "Not requeued: four nodes were unfit, so the nodes may not be the cause." >&2
      exit 69
    fi
    excluded=$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^ (]*\).*/\1/p')
    trap '' TERM # Slurm sends TERM on a requeue. Excluded nodes can only be changed after it
    scontrol requeue "$job"
    [ ! -s "$unfit_nodes" ] || scontrol update "JobId=$job" "ExcNodeList=${excluded:+$excluded,}$(sort -u "$unfit_nodes" | paste -sd,)"
    ;;
  *) rm -f "$unfit_nodes" ;;
esac
exit "$code"
