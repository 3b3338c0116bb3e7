#!/usr/bin/env bash
# What each gate of `.ci/run` does: one function per gate, run as
# `bash .ci/gates.sh NAME` from the root of the workspace.
#
# A gate passes by returning, fails by any other exit status, and is skipped by
# `skip`. It may say why in one line (`fail`, `skip`), which the summary shows.
set -euo pipefail

fail() {
    printf '%s\n' "$1" >>"${GATE_NOTE:-/dev/null}"
    printf 'FAILED: %s\n' "$1" >&2
    exit 1
}

skip() {
    printf '%s\n' "$1" >>"${GATE_NOTE:-/dev/null}"
    printf 'SKIPPED: %s\n' "$1"
    exit 75
}

# Runs a command after showing it, as a person would type it.
run() {
    printf '$ %s\n' "$*"
    "$@"
}

# --- tests -------------------------------------------------------------------

gate_test() {
    run cargo test --workspace
}

# `cargo test --workspace` runs with default features. Where a crate has others,
# its tests run once more with all of them.
gate_test-features() {
    local optional package
    optional=$(members optional)
    if [[ -z $optional ]]; then
        echo 'Every feature of every crate is on by default: `test` has covered them.'
        return
    fi
    for package in $optional; do
        run cargo test -p "$package" --all-features
    done
}

# The script says by itself why it cannot run.
gate_conformance() {
    local log status=0
    log=$(mktemp)
    run tests/autobahn/run | tee "$log" || status=$?
    if ((status == 75)); then
        sed -n 's/^SKIPPED: //p' "$log" >>"${GATE_NOTE:-/dev/null}"
    fi
    rm -f "$log"
    return "$status"
}

# The corpora on any toolchain; then the fuzzer itself, if it can be had.
gate_fuzz() {
    local manifest=fuzz/Cargo.toml folder
    folder=$(mkdir -p "${CARGO_TARGET_DIR:-target}/fuzz" && cd "${CARGO_TARGET_DIR:-target}/fuzz" && pwd)
    run cargo fmt --manifest-path "$manifest" --check
    CARGO_TARGET_DIR=$folder run cargo clippy --manifest-path "$manifest" --no-default-features \
        --all-targets --locked -- -D warnings
    CARGO_TARGET_DIR=$folder run cargo test --manifest-path "$manifest" --no-default-features --locked
    tool cargo-fuzz 0.13.2
    run fuzz/run.sh 5
}

# From a seed of its own each time: what it finds, it prints, as a plan to keep.
gate_lives() {
    run cargo run --release -p trunkline-tests --bin lives -- --lives 20000 --marks
}

# Each fault alone is a test like any other; two of them take minutes, and only
# with optimisation.
gate_model() {
    run cargo test --release -p trunkline-tests --features model --test model -- \
        --include-ignored no_fault no_two --nocapture
}

# Those four that no change may ever hide; the rest with `tests/mutants/run`.
gate_mutants() {
    run tests/mutants/run --check
    run tests/mutants/run --lives 20000 no-fencing cursor-not-marked-dirty ok-before-stored \
        superseded-link-still-counts
}

# Debian's nginx, unpacked beside the other tools where there is none: to install
# the package would be to start a server.
gate_proxy() {
    local root=${CARGO_TARGET_DIR:-target}/tools/nginx
    if ! command -v nginx >/dev/null; then
        if [[ ! -x $root/usr/sbin/nginx ]]; then
            mkdir -p "$root"
            (cd "$root" && unpack nginx) || skip "nginx is not installed and could not be"
        fi
        TRUNKLINE_NGINX=$(cd "$root" && pwd)/usr/sbin/nginx
        export TRUNKLINE_NGINX
    fi
    run cargo test -p trunkline-tests --test nginx -- --nocapture
}

# Unpacks a package of Debian's here, without installing it.
unpack() {
    run apt-get download -q "$1" || { run apt-get update -q && run apt-get download -q "$1"; } || return
    run dpkg -x "$1"_*.deb .
}

# Valgrind says how many they are; without it the bench says so by itself.
gate_instructions() {
    local log status=0
    log=$(mktemp)
    run cargo bench -q -p trunkline-benches --bench instructions -- --check 2>&1 | tee "$log" ||
        status=$?
    if grep -q '^SKIPPED: ' "$log"; then
        status=75
        sed -n 's/^SKIPPED: //p' "$log" >>"${GATE_NOTE:-/dev/null}"
    fi
    rm -f "$log"
    return "$status"
}

gate_demo() {
    run cargo build --example demo
    run cargo run --example demo -- --plain
}

# --- the code as it stands ---------------------------------------------------

gate_fmt() {
    run cargo fmt --all --check
}

gate_clippy() {
    run cargo clippy --workspace --all-targets --all-features -- -D warnings
}

gate_doc() {
    export RUSTDOCFLAGS="-D warnings"
    run cargo doc --workspace --no-deps
    run cargo doc --workspace --no-deps --all-features
}

# --- builds ------------------------------------------------------------------

# One package at a time, since features that are built together hide in each
# other. By clippy rather than check: what is unused without some feature shows.
gate_features() {
    local builds broken=0 package flags
    builds=$(members builds)
    [[ -n $builds ]] || fail "cargo metadata named no package"
    while read -r package flags; do
        # shellcheck disable=SC2086 # the flags are words
        run cargo clippy -q -p "$package" $flags -- -D warnings || broken=$((broken + 1))
    done <<<"$builds"
    ((broken == 0)) || fail "$broken of $(wc -l <<<"$builds" | tr -d ' ') builds failed"
}

gate_msrv() {
    local wanted toolchain
    wanted=$(members rust-version)
    [[ -n $wanted ]] || fail "no rust-version in Cargo.toml"
    if [[ "$(rustc --version)" == "rustc $wanted."* ]]; then
        run cargo check --workspace --all-features
        return
    fi
    toolchain=$(rustup toolchain list 2>/dev/null | grep -oE "^${wanted//./\\.}(\.[0-9]+)?-[^ ]+" | tail -n 1) ||
        skip "no toolchain for Rust $wanted here (\`rustup toolchain install $wanted\`)"
    run cargo "+$toolchain" check --workspace --all-features
}

# What `cargo metadata` knows of the workspace's own packages, one per line.
#   builds        package and flags: bare, default, then each feature alone
#   optional      packages with a feature that is not on by default
#   rust-version  the Rust version that all of them build with
members() {
    cargo metadata --no-deps --format-version 1 | python3 -c '
import json, sys

def on_by_default(features):
    on, todo = set(), ["default"]
    while todo:
        name = todo.pop()
        if name in features and name not in on:
            on.add(name)
            todo += features[name]
    return on

for package in json.load(sys.stdin)["packages"]:
    name, features = package["name"], package["features"]
    if sys.argv[1] == "builds":
        print(name, "--no-default-features")
        print(name)
        for feature in sorted(set(features) - {"default"}):
            print(name, "--no-default-features --features", feature)
    elif sys.argv[1] == "optional":
        if set(features) - on_by_default(features) - {"default"}:
            print(name)
    elif sys.argv[1] == "rust-version":
        version = package["rust_version"]
        if version:
            print(".".join(version.split(".")[:2]))
' "$1" | if [[ $1 == rust-version ]]; then sort -V | tail -n 1; else cat; fi
}

# --- layers ------------------------------------------------------------------

# Handles, shell, core, protocol: dependencies point one way. Each check is
# first shown something it must refuse, so that it cannot pass by being blind.
gate_layers() {
    local bare='trunkline-protocol serde'

    if no_runtime trunkline-protocol <<<"" 2>/dev/null ||
        no_runtime trunkline-protocol <<<"serde" 2>/dev/null ||
        no_runtime trunkline-protocol <<<"${bare// /$'\n'}"$'\n'"tokio" 2>/dev/null ||
        no_runtime trunkline-server < <(tree trunkline-server) 2>/dev/null ||
        ! no_runtime trunkline-protocol <<<"${bare// /$'\n'}"; then
        fail "the check for async runtimes does not check"
    fi
    no_runtime trunkline-protocol < <(tree trunkline-protocol) ||
        fail "trunkline-protocol depends on an async runtime, or its dependencies cannot be read"
    echo "trunkline-protocol depends on no async runtime"

    apart trunkline-server trunkline-client
    apart trunkline-client trunkline-server
    echo "trunkline-server and trunkline-client do not depend on each other"

    [[ $(impure <<<'use tokio::x;') && $(impure <<<'x.await') && ! $(impure <<<'// tokio') &&
        $(impure <<<'use std::net::TcpStream;') && ! $(impure <<<'use std::net::IpAddr;') ]] ||
        fail "the check for pure cores does not check"
    pure agent-protocol/src ws-server/src/core ws-client/src/core
}

# The names of all that a package is built on, itself first.
tree() {
    cargo tree -p "$1" -e normal --target all --all-features --prefix none --format '{p}' |
        cut -d ' ' -f 1 | sort -u
}

# Reads a dependency tree; fails if it is not that of $1, or has a runtime in it.
no_runtime() {
    local names found
    names=$(cat)
    if ! grep -qx "$1" <<<"$names"; then
        echo "this is not the dependency tree of $1" >&2
        return 1
    fi
    if found=$(grep -xE 'tokio(-.*)?|async-.*|smol|mio|polling|embassy-.*|monoio|glommio|compio|futures(-.*)?' <<<"$names"); then
        echo "in the dependency tree of $1:" $found >&2
        return 1
    fi
}

# Fails if package $1 is built on package $2.
apart() {
    local names
    names=$(tree "$1")
    grep -qx "$1" <<<"$names" || fail "no dependency tree of $1"
    ! grep -qx "$2" <<<"$names" || fail "$1 depends on $2"
}

# The lines of code, without comments, that ask for a runtime or for the world.
# An address is a number; what is reached at one is not the core's.
impure() {
    sed -E 's,(^|[^:])//.*,\1,; s,\bstd::net::Ip(v[46])?Addr\b,,g' |
        grep -nE '\b(tokio|tokio_tungstenite|futures_util)\b|\.await\b|\basync( move)? *(\{|\||fn)|\bstd::(net|thread|fs|process|env)\b' || true
}

pure() {
    local folder file files found bad=0
    for folder in "$@"; do
        files=$(find "$folder" -name '*.rs' 2>/dev/null || true)
        [[ -n $files ]] || fail "no Rust files in $folder"
        while read -r file; do
            found=$(impure <"$file")
            if [[ -n $found ]]; then
                bad=1
                sed "s,^,$file:," <<<"$found" >&2
            fi
        done <<<"$files"
    done
    ((bad == 0)) || fail "a core names a runtime, a socket, a task or a file"
    echo "$* name no runtime, socket, task or file"
}

# --- dependencies ------------------------------------------------------------

gate_deny() {
    tool cargo-deny 0.20.2
    run cargo-deny check bans licenses sources
}

gate_advisories() {
    tool cargo-deny 0.20.2
    local log
    if ! log=$(run cargo-deny fetch db 2>&1); then
        printf '%s\n' "$log"
        [[ $log == *"failed to fetch advisory database"* ]] || fail "cargo-deny could not start"
        skip "the advisory database cannot be reached from here: NOTHING was checked"
    fi
    printf '%s\n' "$log"
    run cargo-deny check advisories
}

gate_unused() {
    tool cargo-machete 0.9.2
    # It passes over a manifest that it cannot read.
    cargo metadata --no-deps --format-version 1 >/dev/null
    run cargo-machete --with-metadata --skip-target-dir .
}

# Puts a tool on the path, installing it into the target folder if it is not
# there. Without a network a contributor goes on without it; CI does not.
tool() {
    local name=$1 version=$2
    local root=${CARGO_TARGET_DIR:-target}/tools
    mkdir -p "$root"
    root=$(cd "$root" && pwd)
    PATH=$root/bin:$PATH
    export PATH
    if command -v "$name" >/dev/null; then
        return
    fi
    if ! run cargo install "$name" --version "$version" --locked --quiet --root "$root"; then
        if [[ -n ${CI-} ]]; then
            fail "$name could not be installed"
        fi
        skip "$name is not installed and could not be"
    fi
}

# -----------------------------------------------------------------------------

"gate_$1"
