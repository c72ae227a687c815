#!/usr/bin/env bash
# The few-shot comparison of docs/few-shot.md: four data sets, two shot counts each, all methods, draw by draw.
#
#   benchmarks/fewshot.sh DATA START OUT
#
# DATA   folder with subj, mr, snips and banking77; each has train.tsv and test.tsv with the columns text and label
# START  checkpoint that every method starts from, made by cmlm-fast warm-head
# OUT    folder for cells.jsonl and the tables; stop at any time: the same command continues from the finished cells
#
# Draw 0 of every data set comes first, then draw 1, and so on; the ablations come after the methods. Settings (environment):
set -euo pipefail
data=${1:?folder with the data sets} start=${2:?checkpoint to start from} out=${3:?folder of the results}
: "${JOBS:=2}"                            # single-threaded workers, each with its own data sets
: "${DRAWS:=5}" "${EPOCHS:=1}" "${SETS:=subj snips mr banking77}"
: "${CMLM_FAST:=cmlm-fast}" "${CACHE:=build/fewshot}"
: "${METHODS:=ft,tapt,cmlm,cmlm-no-token,cmlm-paper,simcse,seq-eda,scl}"
: "${ABLATIONS=cmlm-no-sequence,cmlm-no-mlm,cmlm-independent,cmlm-bernoulli,cmlm-whole-word}"
: "${VALIDATION:=}"                       # score this many texts held out of train instead of the test set
: "${OPTIONS:=}"                          # more options of few-shot, for every data set
export OMP_NUM_THREADS=1

worker() {
  local failed=0
  for methods in "$METHODS" "$ABLATIONS"; do
    [ -n "$methods" ] || continue
    for draws in $(seq 1 "$DRAWS"); do
      for name in "$@"; do
        shots=16,64 tuning=()
        if [ "$name" = banking77 ]; then
          shots=16,32                            # its smallest class has 35 texts
          tuning=(--fine-tune-batch-size 64 --fine-tune-learning-rate 5e-4)  # 77 classes: a thousand texts and more
        fi
        scored=(--test "$data/$name/test.tsv")
        [ -n "$VALIDATION" ] && scored=(--validation "$VALIDATION")
        # shellcheck disable=SC2086  # OPTIONS is a list of words
        "$CMLM_FAST" few-shot --model "$start" --name "$name" --train "$data/$name/train.tsv" "${scored[@]}" \
          --methods "$methods" --shots "$shots" --draws "$draws" --epochs "$EPOCHS" --output-dir "$out" --cache-dir "$CACHE" \
          "${tuning[@]}" $OPTIONS | grep "^$name" || failed=$?     # a method that diverges does not stop the other sets
      done
    done
  done
  return "$failed"
}

set -m                                    # a process group for each worker, so that stopping it also stops what it runs
trap 'for job in $(jobs -p); do kill -- "-$job" 2>/dev/null; done; exit 130' INT TERM
read -ra sets <<<"$SETS"
for ((i = 0; i < JOBS && i < ${#sets[@]}; i++)); do
  mine=()
  for ((j = i; j < ${#sets[@]}; j += JOBS)); do mine+=("${sets[j]}"); done
  worker "${mine[@]}" &
done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit "$status"
