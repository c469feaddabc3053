#!/usr/bin/env bash
# Run `sbatch slurm/train.sh` in the repository. Settings come from the environment, which sbatch passes on (or --export),
# or from the file that FT_ENV_FILE names. FT_CONTAINER selects an image. Without it, the job runs from .venv. What your site needs
# first, such as `module load python/3.12 cuda`, goes into a file slurm/site.sh.
#SBATCH --job-name=finetune
#SBATCH --partition=gpu                     # EDIT
##SBATCH --account=my-account               # EDIT
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1                   # several: sbatch --gpus-per-node=8 slurm/train.sh
#SBATCH --cpus-per-gpu=8
##SBATCH --mem-per-gpu=64G                  # EDIT where the site's default is too little for the model's weights
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=finetune-%j.log
#SBATCH --signal=B:USR1@120
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 78
set +u # functions such as `module` and scripts that activate an environment read variables that may not be set
# shellcheck source=/dev/null
[ ! -f slurm/site.sh ] || . slurm/site.sh
set -u

# setting NAME: its value from the environment, or else from the file that the job will read.
setting() {
  local value
  [ -z "${!1:-}" ] || { echo "${!1}" && return; }
  value=$(sed -n "s/^[[:space:]]*\(export[[:space:]]\{1,\}\)\{0,1\}$1[[:space:]]*=[[:space:]]*//p" "${FT_ENV_FILE:-.env}" 2>/dev/null |
    tail -1 | sed "s/^'\([^']*\)'.*/\1/; s/^\"\([^\"]*\)\".*/\1/; s/[[:space:]]\{1,\}#.*//; s/[[:space:]]*\$//")
  # The job, too, replaces ${SCRATCH} in a file by its value. Nothing else in it means anything to this shell.
  while [[ "$value" =~ ^(.*)\$\{([A-Za-z_][A-Za-z_0-9]*)\}(.*)$ ]]; do
    value="${BASH_REMATCH[1]}$(printenv "${BASH_REMATCH[2]}")${BASH_REMATCH[3]}"
  done
  echo "$value"
}

# One element of an array has the array's own id as its SLURM_JOB_ID. Only the longer name means that element alone.
job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}"
job="${job:-$SLURM_JOB_ID}"
# This must be less than the 120 s above. On preemption the partition's GraceTime applies instead, and must be longer.
export FT_STOP_GRACE_SECONDS="${FT_STOP_GRACE_SECONDS:-90}"
# One file per node says how that node ended, because srun has only one exit code for all of them.
export FT_TERMINATION_LOG="$PWD/finetune-$SLURM_JOB_ID.ends"
unfit_nodes="$PWD/finetune-$SLURM_JOB_ID.unfit"
output=$(setting FT_OUTPUT_DIR)
export FT_OUTPUT_DIR="${output:-$PWD/results}"
# Home folders are small, and a quota that is full ends a job after hours.
export HF_HOME="${HF_HOME:-$FT_OUTPUT_DIR/cache/huggingface}" XDG_CACHE_HOME="${XDG_CACHE_HOME:-$FT_OUTPUT_DIR/cache}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$XDG_CACHE_HOME/inductor}" CUDA_CACHE_PATH="${CUDA_CACHE_PATH:-$XDG_CACHE_HOME/cuda}"
rm -rf "$FT_TERMINATION_LOG" && mkdir -p "$FT_TERMINATION_LOG" "$PWD/results" || exit 69

# What a container sees: the submit folder, and the folders that the settings name.
mounts="$PWD:$PWD,$PWD/results:/work"
for name in FT_OUTPUT_DIR FT_STORE_URL FT_MODEL_NAME FT_DATASET_NAME FT_PUBLISH_TO; do
  folders=("$(setting "$name")")
  [ "$name" != FT_PUBLISH_TO ] || IFS=, read -ra folders <<<"${folders[0]}" # it may name several places
  for folder in "${folders[@]}"; do
    folder="${folder#"${folder%%[! ]*}"}" folder="${folder%"${folder##*[! ]}"}" folder="${folder#file://}"
    [[ "$folder" == /* && "$folder" != "$PWD"/* && "$folder" != *[:,]* ]] || continue
    case "$name" in
      FT_OUTPUT_DIR | FT_STORE_URL) mkdir -p "$folder" || exit 69 ;;
      FT_PUBLISH_TO) mkdir -p "$folder" 2>/dev/null || true ;; # preflight says what is wrong with it
    esac
    [ ! -e "$folder" ] || mounts+=",$folder:$folder"
  done
done

python=python3
[ -x .venv/bin/python ] && python="$PWD/.venv/bin/python"
options=(--ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0)
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=("--cpus-per-task=$SLURM_CPUS_PER_TASK") # srun does not inherit it
case "${FT_CONTAINER:-}" in
  "")
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "Python 3.11 or newer is needed, and $python is $("$python" -V 2>&1). Load a module of it in slurm/site.sh, or set FT_CONTAINER." >&2 && exit 78; }
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | sed 's/[^0-9.]//g')
    [ -z "$glibc" ] || printf '2.28\n%s\n' "$glibc" | sort -CV ||
      { echo "PyTorch needs glibc 2.28 or newer, and this node has $glibc. Set FT_CONTAINER." >&2 && exit 78; }
    "$python" -c 'import pydantic_settings' || { echo "Create .venv from requirements.txt, or set FT_CONTAINER." >&2 && exit 78; }
    launch=("$python" entrypoint.py)
    ;;
  *.sif)
    [ -f "$FT_CONTAINER" ] || { echo "FT_CONTAINER=$FT_CONTAINER: no such file." >&2 && exit 78; }
    launch=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" --env "FT_OUTPUT_DIR=$FT_OUTPUT_DIR" "$FT_CONTAINER" python3 /app/entrypoint.py)
    ;;
  *)
    launch=(python3 /app/entrypoint.py)
    options+=(--container-image="$FT_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD" --container-env=FT_OUTPUT_DIR)
    ;;
esac

# Slurm's controller may be away for a minute, when it restarts or is busy. Asks again for five, then gives up.
patiently() {
  local answer
  for pause in 1 4 10 15 30 60 60 60 60 0; do
    answer=$("$@" 2>"$FT_TERMINATION_LOG/refusal") && echo "$answer" && return 0
    grep -qiE 'invalid|denied|disabled|not (support|permit|allow)' "$FT_TERMINATION_LOG/refusal" && return 1 # its last word
    sleep "$pause"
  done
  return 1
}

# An administrator may extend the time limit. The job reads here when it ends, before it stops for that reason.
export JOB_END_TIME_FILE="$FT_TERMINATION_LOG/end-time"
(while sleep "${ASK_SECONDS:-60}"; do
  ends=$(squeue --noheader --jobs="$job" --format=%e 2>/dev/null) && date --date="$ends" +%s >"$JOB_END_TIME_FILE.new" 2>/dev/null &&
    mv "$JOB_END_TIME_FILE.new" "$JOB_END_TIME_FILE"
done) &
asking=$!

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
kill "$asking" 2>/dev/null

# Each node's record says whether another start may succeed, and where. One that says "no" speaks for the job. Without any
# record the job had to leave in the middle of something, and its code speaks.
ends=("$FT_TERMINATION_LOG"/*.json)
case "$code" in 75 | 69) retry=yes ;; *) retry=no ;; esac
! grep -qs '"retry": "\(anywhere\|elsewhere\)"' "${ends[@]}" || retry=yes
if final=$(grep -ls '"retry": "no"' "${ends[@]}" | head -1) && [ -n "$final" ]; then
  retry=no
  code=$(sed -n 's/.*"exit_code": \([0-9]*\).*/\1/p' "$final" | head -1)
fi
(cd "$FT_TERMINATION_LOG" && grep -ls '"retry": "elsewhere"' -- *.json) | sed 's/\.json$//' >>"$unfit_nodes"

# If the job was cancelled or preempted, Slurm itself ends or requeues it. If Slurm does not say, the job is not given up.
state=$(patiently squeue --noheader --jobs="$job" --format=%T) || state=RUNNING
if [ "$state" != RUNNING ]; then
  rm -rf "$FT_TERMINATION_LOG"
  exit "$code"
fi
if [ "$retry" = yes ]; then
  if [ "$(sort -u "$unfit_nodes" | wc -l)" -gt 3 ]; then
    echo "Not requeued: four nodes were unfit, so the nodes may not be the cause." >&2
    exit 69
  fi
  excluded=$(patiently scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^ (]*\).*/\1/p')
  trap '' TERM # Slurm sends TERM on a requeue. Excluded nodes can only be changed after it
  if patiently scontrol requeue "$job" >/dev/null; then
    [ ! -s "$unfit_nodes" ] || patiently scontrol update "JobId=$job" "ExcNodeList=${excluded:+$excluded,}$(sort -u "$unfit_nodes" | paste -sd,)"
  else
    echo "Not requeued: Slurm refuses it: $(cat "$FT_TERMINATION_LOG/refusal")" >&2
    echo "Start it again by hand: FT_RUN_ID=${FT_RUN_ID:-slurm-${job/_/-}} sbatch slurm/train.sh. It resumes from its last checkpoint." >&2
  fi
else
  rm -f "$unfit_nodes"
fi
rm -rf "$FT_TERMINATION_LOG"
exit "$code"
