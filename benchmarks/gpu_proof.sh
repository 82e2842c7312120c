#!/usr/bin/env bash
# What Headroom does on a machine with an NVIDIA GPU: checks, tests, every preset and the benchmarks of watching, run in
# pieces of limited time. `make gpu-proof`, or without make `bash benchmarks/gpu_proof.sh`; docs/gpu.md has the options.
#
# It ends with 0 when all steps are done, with 3 when some are left for another call, with 1 when a step failed.
set -eu
cd "$(dirname "$0")/.."
SECONDS=0

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
fi
FOLDER=${FOLDER:-results/gpu-proof}
PIECE_SECONDS=${PIECE_SECONDS:-570} # how long one call may take
STOP_SECONDS=${STOP_SECONDS:-45}    # how much of it is kept for stopping servers and writing the report so far
LIMIT_MB=${LIMIT_MB:-40}            # of what is collected
SIZE=${SIZE:-short}                 # short, whole (the presets as they are) or smoke (to try this script itself)
RETRY=${RETRY:-}                    # not empty: steps that failed are run again
headroom=("$PYTHON" -c "from experiment.cli import main; main()")
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

say() { echo "gpu-proof: $*"; }
refuse() {
    say "$*" >&2
    exit 2
}

case $SIZE in
short | whole) : "${MODEL:=random:llama-7b}" "${BIG_MODEL:=random:opt-13b}" ;;
smoke) : "${MODEL:=random:tiny}" "${BIG_MODEL:=random:tiny}" ;;
*) refuse "SIZE: '$SIZE': expected short, whole or smoke" ;;
esac
# What the paper's Table 1 has for OPT-13B: 15,700 tokens of 819,200 bytes.
: "${BIG_KV_BUDGET:=12861440000}"
case $MODEL in random:*) export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" ;; esac

# Seconds that a step should have left to be worth its start. A comparison goes on in the next piece: it needs its
# servers and a cell. The others begin anew.
declare -A least=(
    [doctor]=20 [quick]=150 [ladder]=120 [same-memory]=120 [classic]=120 [tests-stack]=300 [monitor]=220
    [paper]=120 [kv-sampling]=230 [tests-hf]=300 [quick-13b]=150 [paper-13b]=150 [own-gpus]=200 [two-gpus]=150
)
# The most telling first.
all="doctor quick ladder same-memory monitor classic paper tests-stack tests-hf kv-sampling quick-13b paper-13b"
GPUS=${GPUS:-$("$PYTHON" -c "from experiment.environment import find_gpus; print(len(find_gpus()[0]))")}
# Those of a shared machine that the user has chosen.
IFS=, read -ra chosen <<<"${CUDA_VISIBLE_DEVICES:-0,1}"
[ -z "${CUDA_VISIBLE_DEVICES:-}" ] || [ "$GPUS" -le ${#chosen[@]} ] || GPUS=${#chosen[@]}
[ "$GPUS" -gt 0 ] || [ "$SIZE" = smoke ] || refuse "no NVIDIA GPU is found here; SIZE=smoke tries the script without"
[ "$GPUS" -lt 2 ] || all="$all own-gpus two-gpus"
STEPS=${STEPS:-$all}
for name in $STEPS; do
    [ -n "${least[$name]:-}" ] || refuse "STEPS: '$name': expected some of ${!least[*]}"
done

# The options of a comparison in `size`: the model, and what its preset is cut down to. SIZE=short is meant to fit each
# into a piece on an H200 with a 7B model, at a price: fewer levels and requests, shorter outputs, of paper one repeat,
# which gives no interval, and all servers of ladder and same-memory resident at once, as their starts would take most of
# the time. KV_BUDGET is of eight sequences of the longest length; a token of random:llama-7b takes 524,288 bytes in
# bfloat16.
size_of() {
    size=(--model "$2")
    local all=(--resident all --max-model-len 512 --gpu-memory-utilization 0.15) eight="${KV_BUDGET:-2147483648}"
    case $SIZE-$1 in
    short-quick) size+=(--levels "1,16" --requests-per-user 2 --min-requests 6 --repeats 3 --output-mean 32) ;;
    short-two-gpus) size+=(--levels "1,16" --requests-per-user 2 --min-requests 6 --repeats 2 --output-mean 32) ;;
    short-ladder)
        size+=(--levels "1,16" --requests-per-user 1 --min-requests 6 --output-mean 32 "${all[@]}")
        size+=(--kv-budget $((4 * eight)))
        ;;
    short-same-memory)
        size+=(--workload lognormal --requests-per-user 1 --output-mean 32 "${all[@]}" --kv-budget "$eight")
        ;;
    short-paper | short-paper-vllm)
        local levels="0.5,1,2"
        [ "$1" = paper ] || levels="4,8,16,32,64"
        size+=(--workload alpaca --levels "$levels" --duration-seconds 30 --ramp-seconds 3 --min-requests 20 --repeats 1)
        ;;
    short-paper-13b*)
        local levels="0.5,1,2,4"
        case $1 in *-static) levels="0.25,0.5" ;; *-vllm) levels="8,12" ;; esac
        size+=(--levels "$levels" --duration-seconds 45 --ramp-seconds 5 --min-requests 12 --repeats 1)
        size+=(--kv-budget "$BIG_KV_BUDGET")
        ;;
    short-interference) size+=(--levels 16 --requests-per-user 12 --repeats 3 --output-mean 32) ;;
    whole-paper-vllm) size+=(--levels "8,16,32,64") ;;
    whole-paper-13b-vllm) size+=(--levels "8,12,16" --kv-budget "$BIG_KV_BUDGET") ;;
    whole-paper-13b*) size+=(--kv-budget "$BIG_KV_BUDGET") ;;
    whole-same-memory) size+=(--kv-budget "${KV_BUDGET:-4294967296}") ;;
    whole-interference) size+=(--levels 16 --requests-per-user 12) ;;
    smoke-paper*) size+=(--workload alpaca --levels 2 --requests 4 --ramp-seconds 1 --repeats 1) ;;
    smoke-*)
        size+=(--levels 2 --requests-per-user 2 --min-requests 4 --min-seconds 1 --repeats 1)
        size+=(--workload lognormal --output-mean 8)
        ;;
    esac
    case $SIZE in # of the benchmarks
    short) seconds=(--rounds 3 --cell-seconds 5 --warmup-seconds 1) hz=(--seconds 8) ;;
    whole) seconds=() hz=() ;;
    smoke) seconds=(--rounds 1 --cell-seconds 3 --warmup-seconds 1) hz=(--hz 10 --seconds 2) ;;
    esac
}

# Run a step; ends with 124 when the piece was over before it.
step() {
    case $1 in
    quick-13b) size_of quick "$BIG_MODEL" ;;
    own-gpus) size_of interference "$MODEL" ;;
    *) size_of "$1" "$MODEL" ;;
    esac
    case $1 in
    doctor) limited "${headroom[@]}" doctor ;;
    classic) limited "${headroom[@]}" classic --out "$FOLDER/runs/classic" ;;
    paper) paper ;;
    paper-13b) paper_13b ;;
    quick | ladder | same-memory) compare "$1" --preset "$1" "${size[@]}" ;;
    quick-13b) compare "$1" --preset quick "${size[@]}" ;;
    own-gpus) own_gpus ;;
    two-gpus) two_gpus ;;
    monitor)
        benchmark monitor "${hz[@]}" --servers sequential,vllm \
            --vllm-args "--gpu-memory-utilization 0.5 --max-model-len 2048 -- --enforce-eager"
        ;;
    kv-sampling) benchmark kv_sampling ;;
    tests-stack) tests test_same_outputs test_vllm_budget test_monitor test_loadtest ;;
    tests-hf) tests test_hf_process test_hf_worker test_hf_chaos ;;
    esac
}

# Run a command until the piece is over, with what it says in the log of the step.
limited() {
    local code=0
    # SIGTERM, which our commands take as Ctrl-C: a shell's children in the background may ignore SIGINT.
    timeout --kill-after="$STOP_SECONDS" "$(within "$deadline")" "$@" >>"$log" 2>&1 &
    child=$!
    wait "$child" || code=$?
    child=
    [ $code != 137 ] || [ "$SECONDS" -lt $deadline ] || code=124
    return $code
}

# Seconds until then, of which there is at least one.
within() { echo $(($1 > SECONDS ? $1 - SECONDS : 1)); }

# Run the comparison of a name, or go on with the one that was stopped; `progress` then has the cells it completed.
compare() {
    local runs="$FOLDER/runs/$1" run before=0 code=0
    shift
    run=$(newest "$runs")
    if [ -z "$run" ]; then
        limited "${headroom[@]}" compare --out "$runs" "$@" || code=$?
        run=$(newest "$runs")
    elif before=$(completed "$run") && grep -qs '"complete"' "$run/status.json"; then # its report may be missing
        limited "${headroom[@]}" report "$run" || code=$?
    else
        limited "${headroom[@]}" compare --resume "$run" || code=$?
    fi
    progress=$((progress + $(completed "$run") - before))
    return $code
}

newest() {
    local one found=
    for one in "$1"/*/; do [ ! -e "$one/plan.json" ] || found=${one%/}; done
    echo "$found"
}

completed() { grep -ls '"complete": true' "$1"/cells/*/cell.json | wc -l; }

tests() {
    "$PYTHON" -c "import pytest, pytest_asyncio, hypothesis" 2>>"$log" || {
        echo "the tests need pytest, pytest-asyncio and hypothesis, which requirements/dev.txt names" >>"$log"
        return 1
    }
    local files=("${@/#/tests/integration/}")
    limited "$PYTHON" -m pytest -v -p no:cacheprovider "${files[@]/%/.py}"
}

benchmark() {
    limited "$PYTHON" -m "benchmarks.$1" --model "$MODEL" "${seconds[@]}" --out "$FOLDER/figures/$name.json" "${@:2}"
}

# All servers at the same rates, and then vLLM alone at those at which the others would fall behind by minutes.
paper() {
    local plan="$FOLDER/paper-vllm.yaml"
    printf 'preset: paper\ntargets: [{name: vllm, kind: vllm}]\n' >"$plan"
    compare paper --preset paper "${size[@]}" || return
    size_of paper-vllm "$MODEL"
    compare paper-vllm "$plan" "${size[@]}"
}

# The paper's experiment with its model and as little memory: each server at the rates at which it is seen to give in.
paper_13b() {
    local part rows="--max-batch 64" plan
    declare -A targets=(
        [static]="{name: batch-static, kind: hf, args: --engine batch --cache static $rows}"
        [paged]="{name: continuous, kind: hf, args: --engine continuous $rows}, {name: vllm, kind: vllm}"
        [vllm]="{name: vllm, kind: vllm}"
    )
    for part in static paged vllm; do
        plan="$FOLDER/paper-13b-$part.yaml"
        printf 'preset: paper\ntargets: [%s]\n' "${targets[$part]}" >"$plan"
        size_of "paper-13b-$part" "$BIG_MODEL"
        compare "paper-13b-$part" "$plan" "${size[@]}" || return
    done
}

# Each server on a GPU of its own, under load one at a time and then together.
own_gpus() {
    local plan="$FOLDER/own-gpus.yaml"
    [ ${#chosen[@]} -gt 1 ] || {
        echo "own-gpus: CUDA_VISIBLE_DEVICES: '$CUDA_VISIBLE_DEVICES': expected two GPUs, as 0,1" >>"$log"
        return 1
    }
    cat >"$plan" <<END
preset: quick
targets:
  - {name: hf, kind: hf, args: "--engine continuous --max-batch 32", gpus: "${chosen[0]}"}
  - {name: vllm, kind: vllm, gpus: "${chosen[1]}"}
max_model_len: 1024
END
    compare own-gpus-alone "$plan" "${size[@]}" &&
        compare own-gpus-together "$plan" "${size[@]}" --together
}

# Each server on one GPU and spread over two.
two_gpus() {
    local plan="$FOLDER/two-gpus.yaml" batch="--engine batch --max-batch 16"
    cat >"$plan" <<END
preset: quick
targets:
  - {name: hf-1-gpu, kind: hf, args: "$batch"}
  - {name: hf-2-gpus, kind: hf, args: "$batch --device-map auto"}
  - {name: vllm-1-gpu, kind: vllm}
  - {name: vllm-2-gpus, kind: vllm, args: "-- --tensor-parallel-size 2"}
resident: one
max_model_len: 1024
gpu_memory_utilization: 0.8
END
    compare "$name" "$plan" "${size[@]}"
}

# What the steps left, in one folder that can be handed on.
collect() {
    local to="$FOLDER/collected" run into file largest
    rm -rf "$to"
    mkdir -p "$to"
    cp -r "$FOLDER/logs" "$FOLDER/figures" "$to"
    table >"$to/steps.txt"
    echo "Left out of each run: charts/, cells/, timeline/ and kv/. All is in $FOLDER/runs." >"$to/LEFT_OUT.txt"
    for run in "$FOLDER"/runs/*/*/; do
        [ -d "$run" ] || continue
        into="$to/${run#"$FOLDER/runs/"}"
        mkdir -p "$into"
        for file in report.html summary.json summary.csv plan.json environment.json status.json classic.json logs \
            records.parquet timeline.parquet kv.parquet; do
            [ ! -e "$run$file" ] || cp -r "$run$file" "$into"
        done
    done
    # The tables of every request and sample go first: the figures in the reports are made of them.
    while [ "$(du -s --apparent-size --block-size=1 "$to" | cut -f 1)" -gt $((LIMIT_MB * 1000000)) ]; do
        largest=$(find "$to" -name '*.parquet' -printf '%s %P\n' | sort -rn | head -n 1)
        [ -n "$largest" ] || largest=$(find "$to" -type f -not -name '*.txt' -printf '%s %P\n' | sort -rn | head -n 1)
        [ -n "$largest" ] || break
        rm "$to/${largest#* }"
        echo "To stay within $LIMIT_MB MB: ${largest#* }, ${largest%% *} bytes." >>"$to/LEFT_OUT.txt"
    done
}

state_of() {
    local state
    for state in 'done' failed; do [ ! -e "$FOLDER/steps/$1.$state" ] || echo "$state"; done | head -n 1
}

seconds_of() { cat "$FOLDER/steps/$1.seconds" 2>/dev/null || echo 0; }

table() {
    local name state
    printf '%-18s %-7s %s\n' step state seconds
    for name in $STEPS; do
        state=$(state_of "$name")
        printf '%-18s %-7s %s\n' "$name" "${state:-left}" "$(seconds_of "$name")"
    done
}

finish() {
    trap '' INT TERM HUP
    collect
    table
    say "collected in $FOLDER/collected, $(du -s --apparent-size --block-size=1000 "$FOLDER/collected" | cut -f 1) kB"
}

interrupt() {
    [ -z "$child" ] || { kill "$child" && wait "$child"; } || true
    finish
    exit 130
}

# Run the step `name` and note what came of it; `first` says that no other step has run in this piece.
attempt() {
    local begun=$SECONDS code=0
    log="$FOLDER/logs/$name.log" progress=0
    say "$name"
    step "$name" || code=$?
    echo $(($(seconds_of "$name") + SECONDS - begun)) >"$FOLDER/steps/$name.seconds"
    case $code in
    0) touch "$FOLDER/steps/$name.done" ;;
    124)
        say "$name was stopped at the end of the piece"
        [ "$first" = yes ] && [ "$progress" -le 0 ] || return 0
        say "$name got no further with a piece to itself: expected PIECE_SECONDS above $PIECE_SECONDS" | tee -a "$log"
        touch "$FOLDER/steps/$name.failed"
        ;;
    *)
        say "$name failed with $code, see $log"
        tail -n 5 "$log" | sed 's/^/    /'
        touch "$FOLDER/steps/$name.failed"
        ;;
    esac
}

child='' first=yes deadline=$((PIECE_SECONDS - STOP_SECONDS))
[ "$deadline" -gt 0 ] || refuse "PIECE_SECONDS: '$PIECE_SECONDS': expected more than STOP_SECONDS, $STOP_SECONDS"
mkdir -p "$FOLDER/steps" "$FOLDER/logs" "$FOLDER/figures" "$FOLDER/runs"
FOLDER=$(cd "$FOLDER" && pwd)
# What a call left running, if it was killed, holds the lock too.
exec 9>"$FOLDER/lock"
flock --nonblock 9 || refuse "FOLDER: '$FOLDER': another call is at work on it"
for name in SIZE MODEL BIG_MODEL KV_BUDGET BIG_KV_BUDGET; do
    grep -qs "^$name=" "$FOLDER/settings" || echo "$name=${!name:-}" >>"$FOLDER/settings"
    was=$(grep "^$name=" "$FOLDER/settings")
    [ "${was#*=}" = "${!name:-}" ] ||
        refuse "$name: '${!name:-}': expected '${was#*=}', with which $FOLDER was begun; give another FOLDER"
done
trap interrupt INT TERM HUP
[ -z "$RETRY" ] || for name in $STEPS; do rm -f "$FOLDER/steps/$name.failed"; done
for name in $STEPS; do
    [ -z "$(state_of "$name")" ] || continue
    # One that no longer fits is left for the next piece, in which it comes first; a shorter one may fit.
    [ "$first" = yes ] || [ $((deadline - SECONDS)) -ge "${least[$name]}" ] || continue
    attempt
    first=no
done
finish
for name in $STEPS; do [ -n "$(state_of "$name")" ] || { say "steps are left: call again" && exit 3; }; done
for name in $STEPS; do [ "$(state_of "$name")" = 'done' ] || exit 1; done
