#!/usr/bin/env bash
# Keeps a run going until it is done: creates the slice where there is none, installs, launches, and after a preemption
# deletes what is left of the slice and does it all again. It runs here, not on the slice: in tmux or on a small VM.
#
# Each time it looks, it decides by these, in this order:
#   WORKDIR/DONE is there                     done: ends with exit code 0
#   the slice is PREEMPTED, gone, or its
#   request SUSPENDED or FAILED               delete, create, install, launch
#   the slice is READY, a training runs       wait
#   ... no training runs, the last one ended
#   with exit code 0 (it was told to stop)    launch
#   ... the last one failed                   launch, but give up with exit code 1 after --max-failures
#   anything else (CREATING, no answer)       wait
# train.py ends with exit code 0 both when it has finished and when it was preempted; only DONE tells them apart.
# So `sudo systemctl stop` on a host is no way to pause: end this script first.
#
# Needed: all that create.sh and launch.sh need
#   --name NAME --project PROJECT --zone ZONE --accelerator-type TYPE --runtime-version VERSION
#   --workdir gs://BUCKET/DIRECTORY     the hosts' own disks do not survive a preemption
#   -- CONFIG ARGUMENT...               what train.py gets, beside --workdir and --multihost
# Options: those of create.sh, install.sh and launch.sh, and
#   --poll-seconds SECONDS    between two looks (default 60)
#   --max-failures NUMBER     failed trainings, installations or creations it puts up with, counted since the last
#                             preemption (default 3); too little capacity is not counted
#   --config FILE             settings as in config.env.example; flags and SORA_* variables come first
#   --dry-run                 print the commands of one round, run nothing
#
# Examples:
#   tpu_setup/resume.sh --name sora --project my-project --zone us-west4-a --provisioning queued-spot \
#       --accelerator-type v5litepod-8 --runtime-version v2-alpha-tpuv5-lite \
#       --workdir gs://my-bucket/runs/emoji --data gs://my-bucket/fluent_emoji \
#       -- sora_emoji --data.path ../data --data.batch-size 8 --data.num-shards 8
#   SORA_CONFIG=sora.env tpu_setup/resume.sh --dry-run \
#       -- sora_emoji --data.path ../data --data.batch-size 8 --data.num-shards 8
set -euo pipefail
source "$(dirname "$0")/settings.sh"

done_state() { # prints finished, unfinished or unknown
  local said
  if said=$(gcloud storage ls "$SORA_WORKDIR/DONE" 2>&1); then
    echo finished
  elif [[ $said == *"matched no objects"* ]]; then
    echo unfinished
  else
    echo "$said" >&2
    echo unknown
  fi
}

QUESTION="" # set once the settings are read
job_state() { # prints running (on any host), missing (not installed), failed, stopped or unknown
  local said
  said=$(on_hosts all "$QUESTION" </dev/null) || said=""
  case $said in
    *state=active* | *state=activating* | *state=deactivating*) echo running ;;
    *state=missing*) echo missing ;;
    *state=failed*) echo failed ;;
    *state=inactive*) echo stopped ;;
    *) echo unknown ;;
  esac
}

failures=0
failure() { # MESSAGE: counts it; gives up after too many
  failures=$((failures + 1))
  ((failures <= SORA_MAX_FAILURES)) ||
    fail "$1; that is failure $failures, more than --max-failures $SORA_MAX_FAILURES. The slice is left as it is."
  say "$1 (failure $failures, $SORA_MAX_FAILURES allowed)"
}

create() {
  local said
  said=$(mktemp)
  if "$HERE/create.sh" --wait 2>&1 </dev/null | tee "$said" >&2; then
    rm -f "$said"
    return 0
  fi
  if grep -qi capacity "$said"; then
    say "too little capacity in $SORA_ZONE; trying again"
  else
    failure "creating $SORA_NAME failed"
  fi
  rm -f "$said"
  return 1
}

install_and_launch() {
  if ! "$HERE/install.sh" </dev/null; then
    failure "installing on $SORA_NAME failed"
  else
    launch
  fi
}

launch() {
  "$HERE/launch.sh" -- "${REST[@]}" </dev/null || failure "launching on $SORA_NAME failed"
}

replace() { # WHY: deletes what is left of the slice and makes it again
  say "$SORA_NAME is $1: creating it"
  if [[ $1 != gone ]]; then
    failures=0
    "$HERE/delete.sh" --now --yes || {
      failure "deleting $SORA_NAME failed"
      return
    }
  fi
  if create; then install_and_launch; fi
}

last=""
say_once() { # MESSAGE: unless it was the last one
  [[ $1 == "$last" ]] || say "$1"
  last=$1
}

look() { # one round; ends the script where the run is done
  local slice request job
  case $(done_state) in
    finished)
      say "done: $SORA_WORKDIR/DONE is there. delete.sh deletes $SORA_NAME, which costs money until then."
      exit 0
      ;;
    unknown)
      say_once "cannot tell whether $SORA_WORKDIR is done; trying again"
      return
      ;;
  esac
  if ! slice=$(slice_state) || { queued && ! request=$(request_state); }; then
    say_once "cannot ask for the state of $SORA_NAME; trying again"
    return
  fi
  if queued; then
    case ${request:-gone} in
      SUSPENDED | FAILED | gone)
        replace "${request:-gone}"
        return
        ;;
      SUSPENDING | DELETING)
        say_once "$SORA_NAME: $request"
        return
        ;;
    esac
  fi
  case ${slice:-gone} in
    READY)
      job=$(job_state)
      case $job in
        missing) install_and_launch ;;
        stopped)
          say "no training runs on $SORA_NAME and $SORA_WORKDIR is not done: launching"
          launch
          ;;
        failed)
          failure "the training on $SORA_NAME failed (follow.sh shows why)"
          launch
          ;;
        *) say_once "$SORA_NAME is READY, training: $job" ;;
      esac
      ;;
    PREEMPTED | TERMINATED) replace "$slice" ;;
    gone)
      if queued; then
        say_once "$SORA_NAME: $request"
      else
        replace gone
      fi
      ;;
    STOPPED) fail "$SORA_NAME is STOPPED; start it (gcloud compute tpus tpu-vm start) or delete it" ;;
    *) say_once "$SORA_NAME is $slice" ;;
  esac
}

read_settings "name project zone accelerator-type runtime-version provisioning valid-until service-account network
  subnetwork internal-ips poll-seconds max-failures directory python revision data workdir rest" \
  "provisioning=on-demand poll-seconds=60 max-failures=3 directory=sora revision=HEAD" "$@"
require name project zone accelerator-type runtime-version workdir
one_of provisioning on-demand spot queued queued-spot
count poll-seconds 1
count max-failures 0
[[ $SORA_WORKDIR == gs://?* ]] ||
  unusable "--workdir must be gs://BUCKET/DIRECTORY, for a preemption takes the hosts' disks along; got '$SORA_WORKDIR'"
SORA_WORKDIR=${SORA_WORKDIR%/}
training_arguments
SORA_REVISION=$(git -C "$(dirname "$HERE")" rev-parse --quiet --verify "$SORA_REVISION^{commit}") ||
  unusable "--revision: this checkout has no such commit" # resolved once: later commits must not change the run
QUESTION="if [ -e $(quote "$SORA_DIRECTORY/installed") ]; then echo state=\$(systemctl is-active $SERVICE); else echo state=missing; fi"

if dry_run; then
  echo "# every $SORA_POLL_SECONDS s; done where this finds the file:"
  quote gcloud storage ls "$SORA_WORKDIR/DONE"
  echo "# the states of the slice and of the training:"
  slice_state
  if queued; then request_state; fi
  on_hosts all "$QUESTION"
  echo "# where the slice was preempted:"
  "$HERE/delete.sh" --now --yes
  "$HERE/create.sh" --wait
  "$HERE/install.sh"
  echo "# then, and where the training has ended and is not done:"
  "$HERE/launch.sh" -- "${REST[@]}"
  exit
fi
while true; do
  look
  sleep "$SORA_POLL_SECONDS"
done
