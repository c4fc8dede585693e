#!/usr/bin/env bash
# Shows the log of a training as it grows. Ctrl-C ends the showing, not the training.
#
# Needed:
#   --name NAME --project PROJECT --zone ZONE
# Options:
#   --worker WORKER           number of the host, or all (default 0)
#   --lines LINES             of the log to begin with (default 100)
#   --directory DIRECTORY     where install.sh has put the code (default sora)
#   --internal-ips            reach the hosts by their internal addresses
#   --config FILE             settings as in config.env.example; flags and SORA_* variables come first
#   --dry-run                 print the gcloud command, run nothing
#
# Examples:
#   tpu_setup/follow.sh --name sora --project my-project --zone us-west4-a
#   SORA_CONFIG=sora.env tpu_setup/follow.sh --worker all --lines 5
set -euo pipefail
source "$(dirname "$0")/settings.sh"

read_settings "name project zone worker lines directory internal-ips" "worker=0 lines=100 directory=sora" "$@"
require name project zone
[[ $SORA_WORKER == all ]] || count worker 0
count lines 0
on_hosts "$SORA_WORKER" "tail -n $SORA_LINES -F $(quote "$SORA_DIRECTORY/train.log")"
