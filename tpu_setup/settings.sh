# Sourced by the scripts beside it: their settings, and the gcloud commands that more than one of them gives.
#
# A setting is a flag, an environment variable or a line of a file, in this order of precedence:
#     --accelerator-type v5litepod-8      SORA_ACCELERATOR_TYPE=v5litepod-8      --config FILE (or SORA_CONFIG)
# A switch (--dry-run) is on where its variable is 1. All settings are exported, so that a script called by another
# one has the same.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
SCRIPT=$(basename "$0")
SERVICE=sora-train # the systemd unit of the training on each host
readonly HERE SCRIPT SERVICE

VALUES="name project zone accelerator-type runtime-version provisioning valid-until service-account network subnetwork
poll-seconds directory python revision data workdir worker lines max-failures"
SWITCHES="dry-run internal-ips wait now yes"

unusable() { # MESSAGE: ends the script, its command line cannot be used
  echo "$SCRIPT: $1 (--help shows examples)" >&2
  exit 2
}

fail() { # MESSAGE
  echo "$SCRIPT: $1" >&2
  exit 1
}

say() { # MESSAGE: what is going on, with the time
  echo "$(date '+%Y-%m-%d %H:%M:%S') $1" >&2
}

contains() { # WORDS WORD
  local word
  for word in $1; do
    [[ $word != "$2" ]] || return 0
  done
  return 1
}

variable() { # SETTING: prints the name of its variable
  tr 'a-z-' 'A-Z_' <<<"sora-$1"
}

show_help() { # prints the comment that the script opens with
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

read_settings() { # ACCEPTED DEFAULTS ARGUMENT...: sets SORA_*, and REST to what follows --
  local accepted="$1 dry-run" defaults=$2 option value
  local config=${SORA_CONFIG-}
  shift 2
  REST=()
  while (($#)); do
    case $1 in
      -h | --help)
        show_help
        exit 0
        ;;
      --)
        contains "$accepted" rest || unusable "it takes nothing after --, got '${2-}'"
        shift
        REST=("$@")
        break
        ;;
      --*)
        option=${1#--}
        option=${option%%=*}
        [[ $option == config ]] || { contains "$VALUES $SWITCHES" "$option" && contains "$accepted" "$option"; } ||
          unusable "it has no option --$option"
        if contains "$SWITCHES" "$option"; then
          [[ $1 != *=* ]] || unusable "--$option takes no value, got '$1'"
          value=1
        elif [[ $1 == *=* ]]; then
          value=${1#*=}
        else
          [[ $# -gt 1 && $2 != --* ]] || unusable "--$option needs a value"
          value=$2
          shift
        fi
        if [[ $option == config ]]; then
          config=$value
        else
          export "$(variable "$option")=$value"
        fi
        ;;
      *) unusable "unexpected argument '$1'" ;;
    esac
    shift
  done
  [[ -z $config ]] || read_config "$config"
  for option in $defaults; do
    value=$(variable "${option%%=*}")
    [[ -n ${!value-} ]] || export "$value=${option#*=}"
  done
}

read_config() { # FILE: sets what neither a flag nor the environment has set
  local line name known=""
  [[ -f $1 ]] || unusable "--config: there is no file '$1'"
  for name in $(tr 'a-z-' 'A-Z_' <<<"$VALUES $SWITCHES"); do known+=" SORA_$name"; done
  while IFS= read -r line || [[ -n $line ]]; do
    [[ -n ${line//[[:space:]]/} && $line != \#* ]] || continue
    name=${line%%=*}
    [[ $line == *=* ]] && contains "$known" "$name" ||
      unusable "$1: not a setting: '$line'; lines are NAME=VALUE with a NAME of config.env.example"
    line=${line#*=}
    case $line in # a value may be quoted, as in a shell
      \"*\" | \'*\') line=${line:1:${#line}-2} ;;
    esac
    [[ -n ${!name+set} ]] || export "$name=$line"
  done <"$1"
}

require() { # SETTING...
  local option name
  for option in "$@"; do
    name=$(variable "$option")
    [[ -n ${!name-} ]] || unusable "--$option (or $name) is needed"
  done
}

one_of() { # SETTING VALUE...
  local name option=$1
  name=$(variable "$option")
  shift
  contains "$*" "${!name}" || unusable "--$option must be one of $*, got '${!name}'"
}

count() { # SETTING LEAST
  local name
  name=$(variable "$1")
  [[ ${!name} =~ ^[0-9]{1,9}$ ]] && ((10#${!name} >= $2)) ||
    unusable "--$1 must be a whole number of at least $2, got '${!name}'"
}

training_arguments() { # checks REST, the arguments of train.py
  local argument
  [[ -n ${REST[0]-} && ${REST[0]} != -* ]] || unusable "the training's CONFIG and arguments are needed after --"
  for argument in "${REST[@]}"; do
    case $argument in
      --workdir | --workdir=*) unusable "--workdir is this script's: give it before --" ;;
      --multihost) unusable "--multihost is added by itself" ;;
    esac
  done
}

queued() { [[ $SORA_PROVISIONING == queued* ]]; }

dry_run() { [[ ${SORA_DRY_RUN-} == 1 ]]; }

quote() { # WORD...: prints them as a shell reads them back
  local word line=""
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

run() { # COMMAND...: runs it, or prints it with --dry-run
  if dry_run; then
    quote "$@"
  else
    "$@"
  fi
}

place() { # sets PLACE, the flags that every command about this slice has
  PLACE=("--project=$SORA_PROJECT" "--zone=$SORA_ZONE")
}

on_hosts() { # WORKER COMMAND: runs a command on one host or on all
  local flags=()
  place
  [[ ${SORA_INTERNAL_IPS-} != 1 ]] || flags=(--internal-ip)
  run gcloud compute tpus tpu-vm ssh "$SORA_NAME" "${PLACE[@]}" ${flags[@]+"${flags[@]}"} "--worker=$1" "--command=$2"
}

slice_state() { # prints READY, CREATING, PREEMPTED ...; nothing where there is no such slice; fails if it cannot ask
  state_of tpu-vm 'csv[no-heading](name.basename(),state)'
}

request_state() { # the same of a queued resource: WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED ...
  state_of queued-resources 'csv[no-heading](name.basename(),state.state)'
}

state_of() { # KIND FORMAT
  local listed
  place
  if dry_run; then
    quote gcloud compute tpus "$1" list "${PLACE[@]}" "--format=$2"
    return
  fi
  listed=$(gcloud compute tpus "$1" list "${PLACE[@]}" "--format=$2") || return 1
  printf '%s\n' "$listed" | awk -F, -v name="$SORA_NAME" '$1 == name { print $2 }'
}
