# shellcheck shell=bash
# Shared by the lab's scripts; sourced, never run. Sets where things lie and
# how a message looks. Messages go to stderr, so that a script's stdout stays
# its answer (usually one path).

LAB_SRC=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
LAB_REPO=$(cd "$LAB_SRC/../.." && pwd)
LAB_CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/xftrace-lab
# LAB_REPO is for the scripts that source this file.
export LAB_SRC LAB_REPO LAB_CACHE

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
die() {
    printf '%s: error: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

# 75 -> 1m15s
duration() {
    if (($1 < 60)); then
        printf '%ds' "$1"
    else
        printf '%dm%02ds' $(($1 / 60)) $(($1 % 60))
    fi
}

# A digest of standard input, short enough for a file name and long enough
# that two different inputs in one cache do not meet.
digest() { sha256sum | cut -c1-16; }

# take_lock NAME: hold a lock of the cache for the rest of the script, so that
# two runs do not build the same thing twice. The lock lives on descriptor 9;
# children that outlast the script must close it.
take_lock() {
    mkdir -p "$LAB_CACHE"
    exec 9>"$LAB_CACHE/$1.lock"
    if ! flock --nonblock 9; then
        say "waiting for another run that holds $LAB_CACHE/$1.lock"
        flock 9
    fi
}

# prune_cache PREFIX COUNT: keep the COUNT most recently used directories
# PREFIX-* of the cache. Call with the lock held. What a killed run left
# half-built and the logs of failures go too.
prune_cache() {
    local entry
    rm -rf "$LAB_CACHE"/"$1"-*.tmp.* "$LAB_CACHE"/"$1"-*.log
    # shellcheck disable=SC2012 # the names are ours: a prefix and hex digits
    ls -1dt "$LAB_CACHE"/"$1"-*/ 2>/dev/null | tail -n "+$(($2 + 1))" |
        while read -r entry; do rm -rf "$entry"; done
}

# rust_on_path: put a cargo that is new enough for Cargo.toml's rust-version
# on PATH, the one found first if that will do. Returns 1 if there is none.
rust_on_path() {
    local wanted dir
    wanted=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' "$LAB_REPO/Cargo.toml")
    for dir in "$(dirname "$(command -v cargo || echo /nonexistent/cargo)")" \
        "$HOME/.cargo/bin" /usr/bin; do
        if rust_is_at_least "$dir/cargo" "$wanted" && rust_is_at_least "$dir/rustc" "$wanted"; then
            PATH=$dir:$PATH
            return 0
        fi
    done
    return 1
}

# rust_is_at_least PROGRAM VERSION: whether `PROGRAM --version` says so.
rust_is_at_least() {
    local version
    [[ -x $1 ]] || return 1
    version=$("$1" --version 2>/dev/null) || return 1
    [[ $version =~ ^[a-z]+\ ([0-9]+\.[0-9]+) ]] || return 1
    [[ $(printf '%s\n' "$2" "${BASH_REMATCH[1]}" | sort -V | head -n 1) == "$2" ]]
}
