#!/usr/bin/env bash
# Makes what jaxvid needs on a bare image: bash bootstrap.sh ROOT [PYTHON]
#
#   ROOT    holds the unpacked archive; the environment is made in ROOT/env, and ROOT/python says
#           which interpreter to use
#   PYTHON  an interpreter that has the dependencies already: nothing is installed
#
# Libraries of the system that OpenCV links; Python of the version that the archive names, its own
# if the machine has another; the pinned dependencies. Run again, it does only what is missing.
set -euo pipefail

root=$(cd "$1" && pwd)
given=${2:-}
UV=0.13.8

say() { printf '[bootstrap] %s\n' "$*" >&2; }

die() {
  say "$*"
  exit 1
}

as_root() {
  if [[ $(id -u) -eq 0 ]]; then
    "$@"
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    sudo -n "$@"
  else
    return 1
  fi
}

install_packages() {
  command -v apt-get >/dev/null ||
    die "this machine lacks $* and has no apt-get; install them, or ask who runs it to"
  say "installing $*"
  # A fresh cloud image runs its own updates, which hold the lock for minutes.
  local apt=(apt-get -qq -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3)
  {
    as_root "${apt[@]}" update &&
      as_root env DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends "$@"
  } >&2 || die "could not install $*; without root, ask who runs this machine to install them"
}

system_libraries() {
  local known missing=()
  known=$(PATH=$PATH:/usr/sbin:/sbin ldconfig -p)
  [[ $known == *libGL.so.1* ]] || missing+=(libgl1)
  [[ $known == *libgthread-2.0.so.0* ]] || missing+=(libglib2.0-0)
  if ((${#missing[@]})); then install_packages "${missing[@]}"; fi
}

find_uv() {
  if command -v uv >/dev/null; then
    uv=uv
    return
  fi
  uv=$root/uv/bin/uv
  [[ -x $uv ]] && return
  if ! python3 -c 'import ensurepip' 2>/dev/null; then
    install_packages python3 python3-venv ca-certificates
  fi
  rm -rf "$root/uv"
  python3 -m venv "$root/uv"
  "$root/uv/bin/pip" install -q "uv==$UV"
}

make_environment() {
  local wanted
  wanted=$(sha256sum "$root/requirements.txt" "$root/python-version" | cut -d ' ' -f 1 | tr '\n' ' ')
  if [[ -f $root/env/made-of && $(<"$root/env/made-of") == "$wanted" ]]; then
    say "the environment is there"
    return
  fi
  find_uv
  say "an environment of Python $(<"$root/python-version")"
  rm -rf "$root/env"
  "$uv" venv -q --python "$(<"$root/python-version")" "$root/env"
  "$uv" pip install -q --python "$root/env/bin/python" -r "$root/requirements.txt"
  printf '%s\n' "$wanted" >"$root/env/made-of"
}

system_libraries
if [[ -n $given ]]; then
  python=$given
else
  make_environment
  python=$root/env/bin/python
fi
# Imports alone: touching the devices would wait for the other hosts.
PYTHONPATH=$root/code "$python" -c 'import cv2, jax, jaxvid; print("jax", jax.__version__)' ||
  die "$python cannot import cv2, jax and jaxvid: see above"
printf '%s\n' "$python" >"$root/python"
