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

# Less than the 120 s above; on preemption the partition's GraceTime counts, and must be longer.
export FT_STOP_GRACE_SECONDS="${FT_STOP_GRACE_SECONDS:-90}"
# How each node ended, one file a node: srun's exit code is one for all.
export FT_TERMINATION_LOG="$PWD/finetune-$SLURM_JOB_ID.ends"
rm -rf "$FT_TERMINATION_LOG" && mkdir -p "$FT_TERMINATION_LOG" "$PWD/results" || exit 69

python=python3
[ -x .venv/bin/python ] && python="$PWD/.venv/bin/python"
pyxis=()
case "${FT_CONTAINER:-}" in
  "") launch=("$python" entrypoint.py) ;;
  *.sif) launch=(apptainer exec --nv --bind "$PWD,$PWD/results:/work" --pwd "$PWD" "$FT_CONTAINER" python3 /app/entrypoint.py) ;;
  *) launch=(python3 /app/entrypoint.py) && pyxis=(--container-image="$FT_CONTAINER" --container-mounts="$PWD:$PWD,$PWD/results:/work" --container-workdir="$PWD") ;;
esac

# Slurm tells only this shell of the time limit, and only the step of a preemption. A node that fails ends the others by
# itself, in time to store a checkpoint, and those that are done early must not be waited for: so no kill, and no wait.
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 "${pyxis[@]}" "${launch[@]}" run &
step=$!
trap 'interrupted=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM INT
while :; do # a trapped signal ends wait early, with a status that is not the step's
  interrupted=0
  wait "$step"
  code=$?
  [ "$interrupted" = 1 ] || break
done

unfit=$(cd "$FT_TERMINATION_LOG" && grep -l '"exit_code": 69' -- *.json 2>/dev/null | sed 's/\.json$//' | paste -sd,)
rm -rf "$FT_TERMINATION_LOG"
# Cancelled or preempted, the job is Slurm's to end or to requeue.
[ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ] || exit "$code"
case "$code" in
  75 | 69) # 75: stopped with a committed checkpoint. 69: a node is unfit, so come back on others
    excluded=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*ExcNodeList=\([^ (]*\).*/\1/p')
    trap '' TERM # which Slurm sends on a requeue; only from then on can the excluded nodes be changed
    scontrol requeue "$SLURM_JOB_ID"
    [ -z "$unfit" ] || scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${excluded:+$excluded,}$unfit"
    ;;
esac
exit "$code"
