# What the scripts here share; sourced by them, not run.
# shellcheck shell=bash

repo=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034  # used by the scripts that source this
cache=${VMCTR_CACHE:-$HOME/.cache/vmctr}

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

step() {
    printf '\n== %s\n' "$*" >&2
}

# field NAME: a field of /etc/os-release.
field() {
    # shellcheck source=/dev/null
    (source /etc/os-release && printf '%s' "${!1-}")
}

# rust_version: the oldest Rust that the workspace builds with.
rust_version() {
    sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$repo/Cargo.toml"
}

# at_least VERSION MINIMUM
at_least() {
    dpkg --compare-versions "$1" ge "$2"
}

# debian_mirror SUITE: the mirror that apt is configured to take Debian's SUITE from.
debian_mirror() {
    # shellcheck disable=SC2016  # apt's own variables
    apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI) $(ORIGIN)' 'Created-By: Packages' |
        awk -v suite="$1" '$1 == suite && $2 == "main" && $4 == "Debian" && !seen++ { print $3 }'
}

# backports: the name of this Debian's backports suite.
backports() {
    printf '%s-backports' "$(field VERSION_CODENAME)"
}
