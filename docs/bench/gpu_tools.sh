#!/usr/bin/env bash
# Looks into the kernels on a GPU with the tools of a CUDA toolkit, which llmpress itself needs none of.
#
#     docs/bench/gpu_tools.sh LLMPRESS OUTDIR [MODEL]
#
# LLMPRESS is the program (a release build), OUTDIR a directory for what the tools print, MODEL a small checkpoint with a
# tokenizer; one with random weights is made otherwise. A tool that is not found is skipped and said so.
#
# memcheck   compute-sanitizer: accesses outside of buffers, misaligned ones, launches and calls that fail
# racecheck  compute-sanitizer: shared memory that threads touch with no barrier between
# synccheck  compute-sanitizer: barriers and warp operations that not all threads reach
#            each on `generate` from fixed12 and dfloat11, and on `bench kernels` with odd shapes
# ncu        Nsight Compute: everything about fixed12's product of one token and dfloat11's decoder (needs permission to
#            read performance counters)
#
# Every run has a limit of time: LIMIT seconds, 120 unless set. Exit code 1 if a tool found something or ran out of time.
set -uo pipefail

if [ $# -lt 2 ] || [ $# -gt 3 ]; then
    sed -n '2,/^set /p' "$0" | grep '^#' | cut -c3- >&2
    exit 2
fi
llmpress=$1 out=$2 model=${3:-}
limit=${LIMIT:-120}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out" || exit 1

if [ -z "$model" ]; then
    model=$scratch/model
    "$llmpress" --quiet bench random-model "$model" --like small >/dev/null || exit 1
fi

failed=0
# run NAME COMMAND...: what it prints goes to OUTDIR/NAME.txt
run() {
    local name=$1 start=$SECONDS code
    shift
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1
    code=$?
    case $code in
    0) echo "$name: nothing found ($((SECONDS - start)) s)" ;;
    124 | 137) echo "$name: OUT OF TIME after $limit s; see $out/$name.txt" ;;
    *) echo "$name: FAILED with exit code $code; see $out/$name.txt" ;;
    esac
    [ $code = 0 ] || failed=1
}

# The smallest work that starts every kind of kernel: tools make it a hundred times slower.
text=(generate "$model" --device cuda --prompt Once --max-new-tokens 3 --temperature 0 --ignore-eos)
kernels=(bench kernels --shape 272x64 --shape 40x136 --tokens 1,5,17,33,100,300 --runs 1 --working-set 16K)

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
        check=(compute-sanitizer --tool "$tool" --error-exitcode 9)
        for weights in fixed12 dfloat11; do
            run "$tool-generate-$weights" "${check[@]}" "$llmpress" --quiet "${text[@]}" --weights "$weights"
        done
        run "$tool-kernels" "${check[@]}" "$llmpress" --quiet "${kernels[@]}"
    done
else
    echo "compute-sanitizer: not found, skipped"
fi

if command -v ncu >/dev/null; then
    # The first launches warm up; two of each kernel are enough.
    profile=(ncu --clock-control none --set full --launch-skip 2 --launch-count 2)
    work=(bench kernels --shape 4096x4096 --tokens 1 --runs 1)
    for kernel in fixed12_stream decode_dfloat11; do
        run "ncu-$kernel" "${profile[@]}" --kernel-name "regex:$kernel" "$llmpress" --quiet "${work[@]}"
    done
    # It ends well when no kernel matched.
    for kernel in fixed12_stream decode_dfloat11; do
        grep -q "Section: GPU Speed Of Light" "$out/ncu-$kernel.txt" ||
            { echo "ncu-$kernel: NO KERNEL was profiled; see $out/ncu-$kernel.txt"; failed=1; }
    done
else
    echo "ncu: not found, skipped"
fi
exit $failed
