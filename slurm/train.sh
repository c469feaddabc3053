#!/usr/bin/env bash
# sbatch slurm/train.sh, from the repository; settings come from the environment (sbatch passes it on) or from .env.
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

python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
export FT_STOP_GRACE_SECONDS="${FT_STOP_GRACE_SECONDS:-90}"

# Slurm tells only this shell of the time limit; the job runs in a step, and scancel tells the step.
srun --kill-on-bad-exit=1 "$python" entrypoint.py run &
step=$!
trap 'interrupted=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 TERM INT
while :; do # a trapped signal ends wait early, with a status that is not the step's
  interrupted=0
  wait "$step"
  code=$?
  [ "$interrupted" = 1 ] || break
done

case "$code" in
  75) scontrol requeue "$SLURM_JOB_ID" ;; # stopped with a committed checkpoint
  69) # this node is unfit: come back on another one
    scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$SLURM_JOB_NODELIST"
    scontrol requeue "$SLURM_JOB_ID"
    ;;
esac
exit "$code"
