#!/usr/bin/env bash
# Runs job.sh on one host: bash worker.sh VERB ROOT [MORE]
#
#   start           in the background, where it outlives the connection; nothing if it runs
#   report          how it stands, and the last 64 KiB of its log, between marks
#   log             all of the log
#   stop [SECONDS]  SIGTERM, so that it saves; SIGKILL after 120 seconds or as many as given
#   task CODES      in the foreground, for srun: its exit code goes to the file CODES/PROCESS
#   supervise       what start runs
set -euo pipefail

verb=$1
root=$(cd "$2" && pwd)
more=${3:-}

born() { # process PID -> when it was started; nothing if it is none, or dead
  local stat fields
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
  read -ra fields <<<"${stat##*) }" # its name, before this, may have blanks
  if [[ ${fields[0]} != Z ]]; then echo "${fields[19]}"; fi
}

# A number is given again after a restart of the machine, so the time of birth must be the same.
running() {
  local pid birth
  [[ -f $root/pid && ! -f $root/code.exit ]] || return 1
  read -r pid birth <"$root/pid"
  [[ $(born "$pid") == "$birth" ]]
}

run_job() { # its exit code, in `code`
  # The trainer gets the signal and saves; this shell only has to outlive it.
  trap ':' TERM
  code=0
  bash "$root/job.sh" || code=$?
}

state() {
  if [[ -f $root/code.exit ]]; then
    echo "exit $(<"$root/code.exit")"
  elif running; then
    echo running
  elif [[ -f $root/pid ]]; then
    echo lost # the machine was started anew
  else
    echo absent
  fi
}

case $verb in
  start)
    if running; then exit 0; fi
    rm -f "$root/pid" "$root/code.exit"
    setsid bash "$0" supervise "$root" </dev/null >>"$root/log" 2>&1 &
    for _ in {1..100}; do
      if [[ -f $root/pid ]]; then exit 0; fi
      sleep 0.1
    done
    echo "job.sh did not start" >&2
    exit 1
    ;;
  supervise)
    sha256sum "$root/bundle.tgz" | cut -c 1-12 >"$root/bundle.id"
    echo "$$ $(born "$$")" >"$root/pid.new" && mv "$root/pid.new" "$root/pid"
    run_job
    echo "$code" >"$root/code.new" && mv "$root/code.new" "$root/code.exit"
    ;;
  task)
    run_job
    echo "$code" >"$more/${SLURM_PROCID:?}"
    exit "$code"
    ;;
  report)
    touch "$root/log"
    size=$(stat -c %s "$root/log")
    echo "::jaxvid state $(state)"
    echo "::jaxvid bundle $(cat "$root/bundle.id" 2>/dev/null || echo none)"
    echo "::jaxvid log $((size > 65536 ? size - 65536 : 0)) $size"
    head -c "$size" "$root/log" | tail -c 65536
    echo "::jaxvid end"
    ;;
  log)
    cat "$root/log"
    ;;
  stop)
    if ! running; then exit 0; fi
    read -r pid _ <"$root/pid"
    kill -TERM -- "-$pid"
    for ((i = 0; i < ${more:-120} * 5; i++)); do
      running || exit 0
      sleep 0.2
    done
    kill -KILL -- "-$pid"
    echo 137 >"$root/code.exit"
    ;;
  *)
    echo "no verb $verb" >&2
    exit 2
    ;;
esac
