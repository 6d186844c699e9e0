# Sourced by the scripts: makes the virtual environment of this checkout and keeps it up to date.
# Needs $root, the top folder. Sets $python, the interpreter of the environment.

say() {
    printf '%s\n' "$*" >&2
}

# find_python: print a Python 3.11 or newer; $PYTHON overrides the search.
find_python() {
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    say "Python 3.11 or newer is needed and was not found (Debian 12, Ubuntu 24.04 and newer: python3); PYTHON=... names one"
    return 1
}

# make_environment EXTRAS: make .venv when it is missing, install the project with EXTRAS when pyproject.toml changed.
make_environment() {
    python="$root/.venv/bin/python"
    stamp="$root/.venv/installed-$1"
    if ! "$python" -c '' 2>/dev/null; then
        found=$(find_python) || return 1
        if ! "$found" -c 'import ensurepip, venv' 2>/dev/null; then
            say "$found has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv), then start again"
            return 1
        fi
        say "making the environment in .venv"
        "$found" -m venv --clear "$root/.venv" || return 1
    fi
    if ! cmp -s "$root/pyproject.toml" "$stamp"; then
        say "installing mqtt_trio with [$1] into .venv"
        "$python" -m pip install --quiet --disable-pip-version-check --editable "$root[$1]" || return 1
        cp "$root/pyproject.toml" "$stamp"
    fi
}
