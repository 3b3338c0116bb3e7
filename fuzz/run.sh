#!/usr/bin/env bash
# Runs the fuzz targets.
#
#   fuzz/run.sh SECONDS              every target for so long, one after the other
#   fuzz/run.sh SECONDS hub log      only these
#   fuzz/run.sh --minimise           folds what was found into the committed corpora
#
# What is new goes to target/fuzz/work, what fails to target/fuzz/artifacts; the
# committed corpora are only read. Without nightly: `RUSTC_BOOTSTRAP` lets the
# stable compiler instrument. No crate here has `unsafe`, so by default without
# a sanitizer, which is ten times as fast; SANITIZER=address for one.
# Exit status: 0 when nothing was found.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
mkdir -p ../target/fuzz
target=$(cd ../target/fuzz && pwd)
export RUSTC_BOOTSTRAP=1

# Memory that one target may take, in MiB; seconds that one input may take.
memory=512 patience=10

# Longest input. Plans of the machines are short, or each takes too long.
length() {
    case $1 in
    agent | dashboard | hub | log | roster) echo 1024 ;;
    *) echo 4096 ;;
    esac
}

dictionary() {
    case $1 in
    decode | link) echo "-dict=$PWD/dictionaries/json.dict" ;;
    esac
}

fuzz() {
    local command=$1 name=$2
    shift 2
    cargo fuzz "$command" --sanitizer "${SANITIZER:-none}" --target-dir "$target" "$name" "$@"
}

what=${1:?how many seconds? see the head of this file}
shift
names=("$@")
if ((${#names[@]} == 0)); then
    mapfile -t names < <(cargo fuzz list)
fi

failed=()
for name in "${names[@]}"; do
    mkdir -p "$target/work/$name" "$target/artifacts/$name" "corpus/$name"
    if [[ $what == --minimise ]]; then
        rm -rf "$target/minimal"
        mkdir "$target/minimal"
        fuzz run "$name" "$target/minimal" "corpus/$name" "$target/work/$name" -- \
            -set_cover_merge=1 -max_len="$(length "$name")" 2>&1 | tail -n 1
        rm -rf "corpus/$name"
        mv "$target/minimal" "corpus/$name"
        continue
    fi
    printf '==> %s\n' "$name"
    # shellcheck disable=SC2046 # no dictionary is no argument
    fuzz run "$name" "$target/work/$name" "corpus/$name" -- -max_total_time="$what" \
        -max_len="$(length "$name")" -rss_limit_mb=$memory -timeout=$patience -print_final_stats=1 \
        -artifact_prefix="$target/artifacts/$name/" $(dictionary "$name") \
        >"$target/$name.log" 2>&1 || failed+=("$name")
    grep -E '^Done |panicked at|ERROR: libFuzzer' -A 1 "$target/$name.log" || true
done

if ((${#failed[@]} > 0)); then
    printf 'FAILED: %s; the inputs are in %s\n' "${failed[*]}" "$target/artifacts" >&2
    exit 1
fi
