# What the shell launchers share: settings, the flags of dpcap.train, dry runs.
# shellcheck shell=bash

dry_run=''
flags=() # of dpcap.train

fail() {
  echo "error: $*" >&2
  exit 2
}

# read_settings NAMES ARGUMENTS...: fills variables of these names, which hold the defaults, from
# --NAME=VALUE, and `flags` from what follows --. All must have a value in the end.
read_settings() {
  local key settings=$1
  shift
  while (($#)); do
    case $1 in
      --)
        shift
        flags=("$@")
        break
        ;;
      --dry_run) dry_run=1 ;;
      --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit
        ;;
      --*=*)
        key=${1%%=*} key=${key#--}
        [[ " $settings " == *" $key "* ]] || fail "--$key is no setting; there are: $settings"
        printf -v "$key" %s "${1#*=}"
        ;;
      *) fail "'$1' is not understood; settings are --NAME=VALUE, flags of dpcap.train follow --" ;;
    esac
    shift
  done
  for key in $settings; do
    [[ -n ${!key} ]] || fail "--$key is missing; $0 --help says what it is"
  done
  for key in nodes gpus_per_node cpus slices; do
    [[ ${!key-1} =~ ^0*[1-9][0-9]*$ ]] || fail "--$key=${!key} must be a whole number of 1 or more"
  done
  for key in restarts grace; do
    [[ ${!key-0} =~ ^[0-9]+$ ]] || fail "--$key=${!key} must be a whole number"
  done
  for key in --config --workdir; do
    [[ " ${flags[*]-}" == *" $key"[=\ ]* ]] ||
      fail "$key is missing; flags of dpcap.train follow --"
  done
}

# The words as one line that a shell reads as these words.
quoted() {
  local line
  printf -v line ' %q' "$@"
  echo "${line# }"
}

# Runs a command, or shows it in a dry run.
run() {
  if [[ $dry_run ]]; then quoted "$@"; else "$@"; fi
}
