#!/usr/bin/env bash
# Ends the training, which saves first, and deletes the slice (and its queued resource) with the disks of its hosts.
#
# Needed:
#   --name NAME --project PROJECT --zone ZONE
# Options:
#   --provisioning HOW        as it was created: on-demand (default), spot, queued or queued-spot
#   --now                     do not wait for the training to save
#   --yes                     do not ask
#   --internal-ips            reach the hosts by their internal addresses
#   --config FILE             settings as in config.env.example; flags and SORA_* variables come first
#   --dry-run                 print the gcloud commands, run nothing
#
# Examples:
#   tpu_setup/delete.sh --name sora --project my-project --zone us-west4-a
#   SORA_CONFIG=sora.env tpu_setup/delete.sh --now --yes
set -euo pipefail
source "$(dirname "$0")/settings.sh"

read_settings "name project zone provisioning now yes internal-ips" "provisioning=on-demand" "$@"
require name project zone
one_of provisioning on-demand spot queued queued-spot

if [[ ${SORA_YES-} != 1 ]] && ! dry_run; then
  [[ -t 0 ]] || unusable "it asks before it deletes and nobody is there to answer; give --yes"
  read -r -p "Delete $SORA_NAME in $SORA_ZONE of $SORA_PROJECT? [y/N] " answer
  [[ $answer == [yY]* ]] || fail "nothing deleted"
fi
if [[ ${SORA_NOW-} != 1 ]]; then
  stop="if systemctl is-active --quiet $SERVICE; then sudo systemctl stop $SERVICE; fi"
  on_hosts all "$stop" || fail "the training could not be ended, so nothing is deleted; --now deletes all the same"
fi
place
if queued; then
  run gcloud compute tpus queued-resources delete "$SORA_NAME" "${PLACE[@]}" --force --quiet
else
  run gcloud compute tpus tpu-vm delete "$SORA_NAME" "${PLACE[@]}" --quiet
fi
